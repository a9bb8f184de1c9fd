"""The Vulkan runtime's arithmetic on the CPU, from the bytes of a ``.pte``."""
