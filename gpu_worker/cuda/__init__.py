"""What a GPU needs beside the engine: CUDA graphs and the size of the pool; copies are in `gpu_worker.memory.pool`.

Nothing here has run on a device. The decisions are plain integers and tested; the rest is exercised on the CPU, where
a "graph" is a function that is called again.
"""
