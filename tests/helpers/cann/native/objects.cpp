// libopapi, the half that is not operators: the descriptors that torch_npu wraps every argument in, and how Python
// reads them. The operators themselves are trampolines that build.py writes.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Python asks for the kind before it reads, so that a misread argument list is an error and not a crash.
enum Kind : int64_t { kTensor = 0x7E4501, kList = 0x7E4502, kInts = 0x7E4503, kScalar = 0x7E4504, kOther = 0x7E4505 };

struct Object {
  const int64_t kind;
};
struct Tensor : Object {
  std::vector<int64_t> shape, strides, storage;
  int64_t offset;
  int32_t dtype, format;
  void *data;
};
struct List : Object {
  std::vector<const void *> items;
};
struct Ints : Object {
  std::vector<int64_t> values;
};
struct Scalar : Object {
  int32_t dtype;
  unsigned char bytes[16];
};

constexpr int32_t kInt8 = 2, kBool = 12;  // aclDataType
constexpr int kNz = 29;                    // aclFormat
constexpr int64_t kTileRows = 16, kTileBytes = 32;
constexpr int kRefused = 161002;

const Tensor &tensor(const void *object) { return *static_cast<const Tensor *>(object); }
const List &list(const void *object) { return *static_cast<const List *>(object); }
const Ints &ints(const void *object) { return *static_cast<const Ints *>(object); }
const Scalar &scalar(const void *object) { return *static_cast<const Scalar *>(object); }

template <class T>
int destroy(const void *object) {
  delete static_cast<const T *>(object);
  return 0;
}

void *make_list(const void *const *items, uint64_t n) {
  return new List{{kList}, std::vector<const void *>(items, items + n)};  // braces would make a list of two pointers
}

}  // namespace

extern "C" {

void emulation_set_error(const char *message);  // runtime.cpp, in libascendcl

void *aclCreateTensor(const int64_t *shape, uint64_t dims, int32_t dtype, const int64_t *strides, int64_t offset,
                      int32_t format, const int64_t *storage, uint64_t storage_dims, void *data) {
  return new Tensor{{kTensor}, {shape, shape + dims}, {strides, strides + dims}, {storage, storage + storage_dims},
                    offset, dtype, format, data};
}
int aclDestroyTensor(const void *object) { return destroy<Tensor>(object); }

void *aclCreateScalar(void *value, int32_t dtype) {
  auto *made = new Scalar{{kScalar}, dtype, {}};
  memcpy(made->bytes, value, dtype == kBool ? 1 : 8);
  return made;
}
int aclDestroyScalar(const void *object) { return destroy<Scalar>(object); }

void *aclCreateIntArray(const int64_t *values, uint64_t n) { return new Ints{{kInts}, {values, values + n}}; }
int aclDestroyIntArray(const void *object) { return destroy<Ints>(object); }

// No emulated operator reads these two.
void *aclCreateBoolArray(const bool *, uint64_t) { return new Object{kOther}; }
int aclDestroyBoolArray(const void *object) { return destroy<Object>(object); }
void *aclCreateFloatArray(const float *, uint64_t) { return new Object{kOther}; }
int aclDestroyFloatArray(const void *object) { return destroy<Object>(object); }

void *aclCreateTensorList(const void *const *items, uint64_t n) { return make_list(items, n); }
int aclDestroyTensorList(const void *object) {
  if (object) std::for_each(list(object).items.begin(), list(object).items.end(), aclDestroyTensor);
  return destroy<List>(object);
}
void *aclCreateScalarList(const void *const *items, uint64_t n) { return make_list(items, n); }
int aclDestroyScalarList(const void *object) {
  if (object) std::for_each(list(object).items.begin(), list(object).items.end(), aclDestroyScalar);
  return destroy<List>(object);
}

int aclGetViewShape(const void *object, int64_t **shape, uint64_t *dims) {
  const auto &values = tensor(object).shape;
  *dims = values.size();
  *shape = new int64_t[values.size() + 1];
  std::copy(values.begin(), values.end(), *shape);
  return 0;
}

// Which tiles a matrix takes in FRACTAL_NZ (formats.py); refuses what would need padding. The caller deletes the shape.
int aclnnNpuFormatCastCalculateSizeAndFormat(const void *source, int format, int, int64_t **shape, uint64_t *dims,
                                             int *found) {
  const auto &values = tensor(source).shape;
  const auto refuse = [](const char *why) { emulation_set_error(why); return kRefused; };
  if (format != kNz) return refuse("aclnnNpuFormatCast: only FRACTAL_NZ is emulated");
  if (tensor(source).dtype != kInt8) return refuse("aclnnNpuFormatCast: FRACTAL_NZ is emulated for int8 alone");
  if (values.size() != 3) return refuse("aclnnNpuFormatCast: FRACTAL_NZ is emulated for three dimensions alone");
  if (values[1] % kTileRows || values[2] % kTileBytes) {
    return refuse("aclnnNpuFormatCast: FRACTAL_NZ is emulated for whole tiles alone");
  }
  *shape = new int64_t[5]{values[0], values[2] / kTileBytes, values[1] / kTileRows, kTileRows, kTileBytes};
  *dims = 5;
  *found = format;
  return 0;
}

// For Python (handles.py)
int64_t object_kind(const void *object) { return static_cast<const Object *>(object)->kind; }
uint64_t tensor_dims(const void *object) { return tensor(object).shape.size(); }
const int64_t *tensor_shape(const void *object) { return tensor(object).shape.data(); }
const int64_t *tensor_strides(const void *object) { return tensor(object).strides.data(); }
uint64_t tensor_storage_dims(const void *object) { return tensor(object).storage.size(); }
const int64_t *tensor_storage(const void *object) { return tensor(object).storage.data(); }
int64_t tensor_offset(const void *object) { return tensor(object).offset; }
int32_t tensor_dtype(const void *object) { return tensor(object).dtype; }
int32_t tensor_format(const void *object) { return tensor(object).format; }
void *tensor_data(const void *object) { return tensor(object).data; }
uint64_t list_length(const void *object) { return list(object).items.size(); }
const void *list_item(const void *object, uint64_t index) { return list(object).items[index]; }
uint64_t ints_length(const void *object) { return ints(object).values.size(); }
const int64_t *ints_values(const void *object) { return ints(object).values.data(); }
int32_t scalar_dtype(const void *object) { return scalar(object).dtype; }
const void *scalar_bytes(const void *object) { return scalar(object).bytes; }

}  // extern "C"
