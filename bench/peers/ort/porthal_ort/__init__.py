"""onnxruntime on the CPU: operators of ONNX and its contrib ones, one graph per call."""

requires = ("onnxruntime", "onnx")
