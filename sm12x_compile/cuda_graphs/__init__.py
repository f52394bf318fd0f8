"""One CUDA graph a call, by Inductor's CUDA graph trees, where that is safe.

`decision` says whether a graph is to be recorded, before it is compiled. `host_values` turns integers that change from
call to call into tensors on the device. `recording` stands between Inductor's code and its CUDA graph trees: it
finds out what must not be recorded while the code still runs uncaptured. `outputs` keeps results of earlier calls
from being overwritten. `syncs` lists where a graph waits for the GPU. `compiling` puts them together.
"""
