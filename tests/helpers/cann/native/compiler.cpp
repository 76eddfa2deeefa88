// libacl_op_compiler: nothing is compiled here, so options are taken and forgotten. Operators come compiled, as on A2 and
// A3; torch_npu asks for that before it takes an aclnn operator for a change of layout.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "acl/acl_rt.h"

extern "C" {

aclError aclSetCompileopt(aclCompileOpt, const char *) { return ACL_SUCCESS; }
size_t aclGetCompileoptSize(aclCompileOpt) { return 256; }
aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t length) {
  if (length) strncpy(value, option == ACL_OP_JIT_COMPILE ? "disable" : "", length);
  return ACL_SUCCESS;
}

// torch_npu looks for these here.
aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t *value) { *value = 0; return ACL_SUCCESS; }
aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtCtxGetSysParamOpt(aclSysParamOpt, int64_t *value) { *value = 0; return ACL_SUCCESS; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }

}  // extern "C"
