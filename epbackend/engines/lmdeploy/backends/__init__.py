"""The devices of LMDeploy with our experts: the CPU, which is ours altogether, and LMDeploy's own CUDA and Ascend."""
