"""Matrices as real packers write them: `python tests/packed/pack.py [PACKAGE]` writes the files beside this one anew.

Needs compressed-tensors 0.20.0, msmodelslim 26.1.0, nvidia-modelopt 0.47.0, torchao 0.18.0, amd-quark 0.13 and torch 2.13.0.
`X.expected` is what the package's own reader makes of matrix X, or for `X.about` the matrix before it was quantised.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

HERE = Path(__file__).parent
Tensors = dict[str, torch.Tensor]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    found = torch.randn(rows, columns) * torch.logspace(-2, 1, rows)[:, None]
    found[3] = 0
    return found.to(dtype)


def compressed_tensors() -> Tensors:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    def args(bits: int, kind: str, strategy: str, **more: Any) -> Any:
        return QuantizationArgs(num_bits=bits, type=kind, strategy=strategy, **{"symmetric": True, **more})

    e8m0 = torch.uint8
    kinds = {
        "int4": ("pack-quantized", args(4, "int", "group", group_size=64)),
        "int4_zero_points": ("pack-quantized", args(4, "int", "group", group_size=32, symmetric=False)),
        "int3": ("pack-quantized", args(3, "int", "channel")),
        "int8_packed": ("pack-quantized", args(8, "int", "group", group_size=32)),
        "int8": ("int-quantized", args(8, "int", "channel")),
        "fp8_tensor": ("float-quantized", args(8, "float", "tensor")),
        "fp8_row": ("float-quantized", args(8, "float", "channel")),
        "fp8_block": ("float-quantized", args(8, "float", "block", block_structure=[128, 128])),
        "nvfp4": (
            "nvfp4-pack-quantized",
            args(4, "float", "tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn),
        ),
        "mxfp4": ("mxfp4-pack-quantized", args(4, "float", "group", group_size=32, scale_dtype=e8m0)),
        "mxfp8": ("mxfp8-quantized", args(8, "float", "group", group_size=32, scale_dtype=e8m0)),
    }
    found: Tensors = {}
    for name, (form, a) in kinds.items():
        w = matrix(*((140, 160) if name == "fp8_block" else (20, 192)))
        if a.strategy == "tensor":
            parts = w.reshape(1, -1)
        elif a.strategy == "channel":
            parts = w[:, None]
        elif a.strategy == "block":
            padded = torch.nn.functional.pad(w, (0, 96, 0, 116))
            parts = padded.reshape(2, 128, 2, 128).transpose(1, 2).flatten(2)
        else:
            parts = w.reshape(len(w), -1, a.group_size)
        state: dict[str, Any] = {"weight": w}
        if name == "nvfp4":
            state["weight_global_scale"] = generate_gparam(w.min().reshape(1), w.max().reshape(1))
        scale, zero = calculate_qparams(parts.amin(-1), parts.amax(-1), a, global_scale=state.get("weight_global_scale"))
        state |= {"weight_scale": scale, "weight_zero_point": zero}
        scheme = QuantizationScheme(targets=["Linear"], weights=a, format=form)
        packer = BaseCompressor.get_value_from_registry(form)
        packed = {k: v for k, v in packer.compress(state, scheme).items() if v is not None}
        found |= {f"{name}.{part}": tensor for part, tensor in packed.items()}
        found[name + ".expected"] = packer.decompress(dict(packed), scheme)["weight"]
    return found


def modelopt() -> Tensors:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export.unified_export_hf import _export_quantized_weight
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor

    found: Tensors = {}
    kinds = {
        "fp8": mtq.FP8_DEFAULT_CFG,
        "fp8_row": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
        "fp8_block": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
        "int4": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
        "int4_awq": mtq.INT4_AWQ_CFG,
        "int8": mtq.INT8_SMOOTHQUANT_CFG,
    }
    for name, config in kinds.items():
        w = matrix(*((140, 160) if name == "fp8_block" else (20, 256)))
        x = (torch.randn(8, w.shape[1]) * torch.logspace(-0.3, 0.3, w.shape[1])).to(w.dtype)
        model = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype))
        model[0].weight.data = w.clone()
        linear = mtq.quantize(model, copy.deepcopy(config), lambda m, x=x: m(x))[0]
        _export_quantized_weight(linear, w.dtype)
        for key, tensor in linear.state_dict().items():
            if "quantizer" not in key or key.endswith("_pre_quant_scale"):
                found[f"{name}.{key.rpartition('._')[2]}"] = tensor
        found[name + ".about"] = w
    w = matrix(20, 256)
    made, s, s2 = NVFP4QTensor.quantize(w, 16)
    expected = made.dequantize(dtype=torch.float32, scale=s, double_scale=s2, block_sizes={-1: 16})
    found |= {"nvfp4.weight": made._quantized_data, "nvfp4.weight_scale": s, "nvfp4.weight_scale_2": s2}
    found["nvfp4.expected"] = expected
    for name, kind, more in (
        ("mxfp4", MXFP4QTensor, {"block_sizes": {-1: 32}}),
        ("mxfp8", MXFP8QTensor, {}),
    ):
        made, s = kind.quantize(w, *(() if name == "mxfp8" else (32,)))
        found |= {f"{name}.weight": made._quantized_data, f"{name}.weight_scale": s.reshape(len(w), -1)}
        found[name + ".expected"] = made.dequantize(dtype=torch.float32, scale=s, **more)
    return found


def msmodelslim() -> Tensors:
    """As its saver for AscendV1 writes them. msModelSlim reads no file: what it expects is what it calculates with."""
    from msmodelslim.core.quant_service.modelslim_v1.save.ascendv1 import AscendV1Config, AscendV1Saver
    from msmodelslim.core.quant_service.modelslim_v1.save.interface import AscendV1GlobalModelDtypeInterface
    from msmodelslim.core.quantizer.linear import LinearQConfig, LinearQuantizer

    class OfBfloat16(AscendV1GlobalModelDtypeInterface):
        def get_global_model_torch_dtype(self) -> torch.dtype:
            return torch.bfloat16

    def part(dtype: str, scope: str, symmetric: bool = True) -> dict[str, Any]:
        ext = {"axes": -1} if scope == "per_block" else {}
        return {"dtype": dtype, "scope": scope, "symmetric": symmetric, "method": "minmax", "ext": ext}

    rows, blocks = part("int8", "per_channel"), part("mxfp8", "per_block")
    kinds = {
        "w8a8": ("w8a8_static", part("int8", "per_tensor", symmetric=False), rows),
        "w8a8_half": ("w8a8_static", part("int8", "per_tensor", symmetric=False), rows),
        "w8a8_mix": ("w8a8_pd_mix", part("int8", "pd_mix", symmetric=False), rows),
        "w8a8_dynamic": ("w8a8_dynamic_per_channel", part("int8", "per_token"), rows),
        "int4": ("w4a8_dynamic", part("int8", "per_token"), part("int4", "per_channel")),
        "fp8": ("wfp8afp8_dynamic_per_channel", part("fp8_e4m3", "per_token"), part("fp8_e4m3", "per_channel")),
        "mxfp8": ("w8a8_mx_dynamic_per_block", blocks, blocks),
        "mxfp4": ("w4a4_mx_dynamic_per_block", part("mxfp4", "per_block"), part("mxfp4", "per_block")),
        "mxfp4_of_mxfp8": ("w4a8_mx_dynamic_per_block", blocks, part("mxfp4", "per_block")),
    }
    found: Tensors = {}
    for name, (kind, act, weight) in kinds.items():
        dtype = torch.float16 if name == "w8a8_half" else torch.bfloat16
        linear = torch.nn.Linear(192, 20, bias=False, dtype=dtype)
        linear.weight.data = w = matrix(20, 192, dtype)
        if name == "w8a8_half":
            w[3] = 1  # of a row of zeros its scale is 0
        quantizer = LinearQuantizer(LinearQConfig(act=act, weight=weight))
        quantizer.setup(linear)
        with torch.no_grad():
            quantizer(torch.randn(8, 192).to(dtype))
            known = quantizer.weight_quantizer(None)
        saver = AscendV1Saver(torch.nn.Module(), AscendV1Config(), None if dtype == torch.float16 else OfBfloat16())
        saver.write_tensor = lambda key, _, tensor: found.__setitem__(key, tensor)
        getattr(saver, f"on_{kind}")(name, quantizer.deploy())
        # It calculates with FP8 that is not rounded, and with another scale than the product of two that it writes.
        about = name in ("fp8", "w8a8", "w8a8_half")
        found[name + (".about" if about else ".expected")] = w if about else known.to(dtype)
    return found


def torchao() -> tuple[Tensors, dict[str, str]]:
    """Flat, as transformers saves them, with what the file's metadata says of each."""
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, NVFP4WeightOnlyConfig
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerGroup,
        PerTensor,
        quantize_,
    )

    few = torch.float4_e2m1fn_x2
    kinds = {
        "int8": Int8DynamicActivationInt8WeightConfig(),
        "int8_alone": Int8WeightOnlyConfig(),
        "int8_tensor": Int8WeightOnlyConfig(granularity=PerTensor()),
        "int8_group": Int8WeightOnlyConfig(granularity=PerGroup(32)),
        "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "int4_zero_points": IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=PerGroup(32), mapping_type=MappingType.ASYMMETRIC
        ),
        "fp8": Float8WeightOnlyConfig(),
        "nvfp4": NVFP4WeightOnlyConfig(),
        "mxfp8": MXDynamicActivationMXWeightConfig(),
        "mxfp4": MXDynamicActivationMXWeightConfig(weight_dtype=few, activation_dtype=few),
    }
    model = torch.nn.ModuleDict()
    expected: Tensors = {}
    for name, config in kinds.items():
        w = matrix(*((144, 160) if "fp4" in name or name == "mxfp8" else (20, 192)))  # of tiles of scales more than one
        one = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype))
        one[0].weight.data = w
        if name == "fp8":
            one[0].weight.data[3] = 1  # of a row of zeros its codes are NaN
        quantize_(one, config)
        model[name] = one[0]
        expected[name + ".expected"] = one[0].weight.dequantize()
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    return tensors | expected, metadata


def quark() -> Tensors:
    """A projection of a model that is exported and read back; times the identity it is what Quark's reader says."""
    from quark.torch import ModelQuantizer, export_safetensors, import_model_from_safetensors
    from quark.torch.quantization.config import config
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    still = {"is_dynamic": False}
    whole = {"symmetric": True, "scale_type": "float", "round_method": "half_even", **still}
    kinds = {
        "fp8_tensor": config.FP8E4M3PerTensorSpec(observer_method="min_max", **still),
        "fp8_row": config.FP8E4M3PerChannelSpec(ch_axis=0, **still),
        "int8_tensor": config.Int8PerTensorSpec(observer_method="min_max", **whole),
        "int8": config.Int8PerChannelSpec(ch_axis=0, **whole),
        "mxfp4": config.OCP_MXFP4Spec(ch_axis=-1, **still),
    }
    sizes = {"hidden_size": 192, "intermediate_size": 20, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    found: Tensors = {}
    for name, spec in kinds.items():
        model, empty = (LlamaForCausalLM(LlamaConfig(**sizes, **heads)).to(torch.bfloat16).eval() for _ in range(2))
        model.model.layers[0].mlp.gate_proj.weight.data = matrix(20, 192)
        layer = config.QLayerConfig(weight=spec.to_quantization_spec())
        done = ModelQuantizer(config.QConfig(global_quant_config=layer, exclude=["lm_head", "*down_proj"])).quantize_model(
            model, [torch.arange(16)[None]]
        )
        with TemporaryDirectory() as folder, torch.no_grad():
            export_safetensors(ModelQuantizer.freeze(done), folder)
            for key, tensor in load_file(Path(folder) / "model.safetensors").items():
                if ".gate_proj." in key:
                    found[f"{name}.{key.rpartition('.')[2]}"] = tensor
            back = import_model_from_safetensors(empty, folder)
            found[name + ".expected"] = back.model.layers[0].mlp.gate_proj(torch.eye(192, dtype=torch.bfloat16)).T
    return found


if __name__ == "__main__":
    from importlib.metadata import version

    from safetensors.torch import save_file

    packers = {
        "compressed-tensors": compressed_tensors,
        "msmodelslim": msmodelslim,
        "nvidia-modelopt": modelopt,
        "torchao": torchao,
        "amd-quark": quark,
    }
    for package in sys.argv[1:] or packers:
        torch.manual_seed(1)
        made = packers[package]()
        found, metadata = made if isinstance(made, tuple) else (made, {})
        tensors = {name: tensor.detach().contiguous().clone() for name, tensor in found.items()}
        save_file(tensors, HERE / f"{package}.safetensors", metadata={"by": f"{package} {version(package)}", **metadata})
