"""What this PC has: NVIDIA cards through NVML, the CPU and its memory, WSL2. The only layer that imports pynvml."""
