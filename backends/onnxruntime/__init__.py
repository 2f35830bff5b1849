"""Every operator as a function of ONNX, run by ONNX Runtime: on the CPU, or on a provider by its name, `onnxruntime:cann`."""

requires = ("onnx", "onnxruntime", "ml_dtypes")
rank = 5
