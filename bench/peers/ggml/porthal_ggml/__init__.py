"""ggml, the library under llama.cpp, in a build without Python around it."""

requires = ("libggml",)
