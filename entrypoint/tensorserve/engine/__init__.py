"""What runs inside vLLM's processes? Only this room and packing/vllm_worker.py import vllm."""
