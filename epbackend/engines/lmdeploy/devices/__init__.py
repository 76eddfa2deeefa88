"""LMDeploy's backends with our experts, one a device; for the CPU, which LMDeploy lacks, attention too."""
