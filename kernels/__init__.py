"""The tensor operations of a forward pass, one folder each: public function, reference, CPU kernel, README.

`kernels/<op>/__init__.py` holds the public function, whose docstring gives the shapes; `reference.py` is the same in
plain PyTorch and is the definition of correct; `cpu.cpp` is the compiled kernel and `cpu.py` calls it. `dispatch.py`
chooses, `build.py` compiles. No `__version__` here and no import that needs a GPU: transformers
probes for a package of this name.
"""
