"""The kernels of an Ascend NPU: `ops` holds every torch_npu operator that is called, `kernels` the contract on top."""
