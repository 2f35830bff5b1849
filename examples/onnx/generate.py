"""Greedy text of an exported model in plain ONNX Runtime: python generate.py model.onnx "text" 60

One request, whose pages are in order; a token is a byte, as in the demo checkpoint.
"""

import sys

import numpy as np
import onnxruntime

PAGE = 64  # tokens


def main(path: str, text: str, count: int) -> None:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ids = list(text.encode())
    pages = -(-(len(ids) + count) // PAGE)
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    cache = {i.name: np.zeros((pages * PAGE, i.shape[1]), types[i.type]) for i in session.get_inputs() if "cache" in i.name}
    names = [o.name for o in session.get_outputs()]
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
            "block_table": np.arange(pages, dtype=np.int32)[None],
        }
        found = dict(zip(names, session.run(None, {**batch, **cache})))
        cache = {name: found[name + "_after"] for name in cache}
        step = [int(found["logits"][0].argmax())]
        ids += step
    sys.stdout.buffer.write(bytes(i for i in ids if i < 256) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
