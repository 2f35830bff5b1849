"""Greedy text of an exported model in plain ONNX Runtime: python generate.py model.onnx "text" 60

One request, whose pages are in order; a token is a byte, as in the demo checkpoint.
"""

import sys

import numpy as np
import onnxruntime

PAGE = 64  # tokens
# Numbers of the cache: their code in ONNX, and what holds their bits. NumPy has no bfloat16.
TYPES = {
    "tensor(float)": (1, np.float32),
    "tensor(float16)": (10, np.float16),
    "tensor(bfloat16)": (16, np.uint16),
    "tensor(int8)": (3, np.int8),
}


def main(path: str, text: str, count: int) -> None:
    onnxruntime.set_default_logger_severity(4)  # what fails is said below
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's have no class in common but this
        why = str(error).splitlines()[0].split(" : ", 3)[-1]
        sys.exit(f"{path} cannot be run: {why}; expected it and {path}.data as they were exported, in one folder")
    ids = list(text.encode())
    if not ids:
        sys.exit("the text is empty: expected at least one byte, as a step has at least one row")
    slots = -(-(len(ids) + count) // PAGE) * PAGE
    cache = {i.name: (TYPES[i.type], (slots, i.shape[1])) for i in session.get_inputs() if "cache" in i.name}
    memory = {name: np.zeros(shape, holder) for name, ((_, holder), shape) in cache.items()}
    seen, step = 0, ids
    for _ in range(count):
        position = np.arange(seen, seen + len(step))
        seen += len(step)
        batch = {
            "ids": np.array(step, np.int32),
            "positions": position.astype(np.int32),
            "visible": (position + 1).astype(np.int32),
            "slots": position,
            "row_request": np.zeros(len(step), np.int32),
            "last_rows": np.array([len(step) - 1], np.int32),
            "kv_len": np.array([seen], np.int32),
            "block_table": np.arange(slots // PAGE, dtype=np.int32)[None],
        }
        binding = session.io_binding()
        binding.bind_output("logits")
        for name, array in batch.items():
            binding.bind_cpu_input(name, array)
        for name, ((code, _), shape) in cache.items():  # written in place
            binding.bind_input(name, "cpu", 0, code, shape, memory[name].ctypes.data)
            binding.bind_output(name + "_after", "cpu", 0, code, shape, memory[name].ctypes.data)
        session.run_with_iobinding(binding)
        step = [int(binding.get_outputs()[0].numpy().argmax())]
        ids += step
    sys.stdout.buffer.write(bytes(i for i in ids if i < 256) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
