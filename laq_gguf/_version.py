"""The version, and the release of llama-cpp-python that it is built for."""

__version__ = "0.1.0"

#: llama-cpp-python mirrors llama.cpp's structs by hand, so its release and our libllama go together
#: (patches/UPSTREAM names the same one; a test compares them).
LLAMA_CPP_PYTHON_VERSION = "0.3.36"
