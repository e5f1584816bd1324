"""Stand-ins for all of FastDeploy but what loads a checkpoint, so that this runs without a GPU."""
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
import unittest.mock

# Modules that run as they are, if the checkout has them; any other below fastdeploy is a stand-in.
REAL_MODULES = {
    "fastdeploy.config",
    "fastdeploy.model_executor.load_weight_utils",
    "fastdeploy.model_executor.utils",
    *(f"fastdeploy.model_executor.layers.{name}"
      for name in ("linear", "embeddings", "lm_head", "normalization", "utils", "quantization", "moe",
                   "attention.attention")),
    *(f"fastdeploy.model_executor.layers.moe.{name}"
      for name in ("moe", "fused_moe_backend_base", "fused_moe_cutlass_backend",
                   "fused_moe_wint2_backend")),
    *(f"fastdeploy.model_executor.layers.quantization.{name}"
      for name in ("quant_base", "wint2", "mix_quant", "weight_only", "kv_cache")),
    *(f"fastdeploy.model_executor.model_loader.{name}" for name in ("base_loader", "default_loader")),
    *(f"fastdeploy.model_executor.models.{name}" for name in ("ernie4_5_moe", "tp_utils", "utils")),
}

class Settings(types.SimpleNamespace):
    """Any option that is not given is None."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class Platform:
    """Says that this is a GPU, so that layers choose as they do there, and that it cannot be used."""

    def available(self):
        return False

    def is_cuda(self):
        return True

    def __getattr__(self, name):
        if name.startswith("is_"):
            return lambda: False
        raise AttributeError(name)


class ModelRegistry:
    """Models by architecture."""
    classes = {}
    pretrained_classes = {}

    @staticmethod
    def register_model_class(*_, **__):
        return lambda model_class: model_class

    @classmethod
    def add_classes_of(cls, module):
        for value in vars(module).values():
            if hasattr(value, "arch_name"):
                cls.pretrained_classes[value.arch_name()] = value
            elif isinstance(value, type) and "set_state_dict" in dir(value) and callable(
                    getattr(value, "name", None)):
                with contextlib.suppress(TypeError):
                    cls.classes[value.name()] = value

    @classmethod
    def get_class(cls, architecture):
        return cls.classes[architecture]

    @classmethod
    def get_pretrain_cls(cls, architecture):
        return cls.pretrained_classes[architecture]

    def get_supported_archs(self):
        return list(self.classes)

    def is_text_generation_model(self, *_):
        return True

    def is_pooling_model(self, *_):
        return False

    is_multimodal_model = is_reasoning_model = is_pooling_model

    def inspect_model_cls(self, architectures, *_):
        return None, architectures[0]


def special_stand_ins():
    """What a mock cannot be: base classes, decorators, and values that are compared."""
    import paddle

    class Model(paddle.nn.Layer):
        def __init__(self, _config):
            super().__init__()

    class Layer(paddle.nn.Layer):
        def __init__(self, *_, **__):
            super().__init__()

    return {
        "fastdeploy.platforms": {"current_platform": Platform()},
        "fastdeploy.envs": {"FD_CACHE_PARAMS": "none", "FD_MOE_BACKEND": "cutlass",
                            "FD_USE_MACHETE": "0", "FD_ENABLE_MODEL_LOAD_CACHE": False},
        "fastdeploy.utils": {"check_unified_ckpt": lambda _: True, "get_logger": unittest.mock.MagicMock()},
        "fastdeploy.transformer_utils.config": {"get_pooling_config": lambda *_: None},
        "fastdeploy.model_executor.forward_meta": {"ForwardMeta": object},
        "fastdeploy.model_executor.graph_optimization.decorator": {
            "support_graph_optimization": lambda model_class: model_class},
        "fastdeploy.model_executor.layers.activation": {"SiluAndMul": Layer},
        "fastdeploy.model_executor.layers.quantization.ops.machete_mm": {"_ENABLE_MACHETE": False},
        "fastdeploy.model_executor.models.model_base": {
            "ModelForCasualLM": Model, "ModelRegistry": ModelRegistry,
            "ModelCategory": unittest.mock.MagicMock()},
    }


class StandInLoader(importlib.abc.Loader):
    """A module of the given values; what else is asked of it is a mock."""

    def __init__(self, values, modules):
        self._values = values
        self._modules = modules

    def exec_module(self, module):
        mock = unittest.mock.MagicMock()

        def attribute(name):
            if name in self._values:
                return self._values[name]
            if name.startswith("__") or f"{module.__name__}.{name}" in self._modules:
                raise AttributeError(name)  # of a module: the import goes on with the finder
            return getattr(mock, name)

        module.__path__ = []
        module.__getattr__ = attribute


class Finder(importlib.abc.MetaPathFinder):
    def __init__(self, checkout):
        self._checkout = checkout
        self._values = special_stand_ins()

    def find_spec(self, name, path=None, target=None):
        del path, target
        if name.split(".")[0] not in ("fastdeploy", "fastsafetensors"):
            return None
        real = self._real_spec(name) if name in REAL_MODULES else None
        loader = StandInLoader(self._values.get(name, {}), REAL_MODULES | self._values.keys())
        return real or importlib.machinery.ModuleSpec(name, loader, is_package=True)

    def _real_spec(self, name):
        path = self._checkout.joinpath(*name.split("."))
        if (path / "__init__.py").exists():
            return importlib.util.spec_from_file_location(name, path / "__init__.py",
                                                          submodule_search_locations=[str(path)])
        file = path.with_suffix(".py")
        return importlib.util.spec_from_file_location(name, file) if file.exists() else None


def keep_off_the_gpu():
    """Paddle's calls that need a GPU, or a group of processes, do without. A group is its size."""
    import paddle
    from paddle.distributed import fleet

    class Embedding(paddle.nn.Layer):
        def __init__(self, rows, width, mp_group, weight_attr):
            super().__init__()
            del weight_attr
            self.weight = self.create_parameter([rows // mp_group, width])

    class Head(paddle.nn.Layer):
        def __init__(self, width, columns, mp_group, **_):
            super().__init__()
            self.weight = self.create_parameter([width, columns // mp_group])

    paddle.Tensor.cuda = lambda tensor, *_, **__: tensor
    paddle.device.empty_cache = paddle.device.synchronize = lambda *_: None
    paddle.device.cuda.empty_cache = lambda *_: None
    fleet.get_hybrid_communicate_group = unittest.mock.MagicMock()
    fleet.meta_parallel.VocabParallelEmbedding = Embedding
    fleet.meta_parallel.ColumnParallelLinear = Head
    paddle.set_default_dtype("bfloat16")


def install_stand_ins(checkout):
    """From here on `import fastdeploy...` means this. checkout: the directory above fastdeploy/."""
    if not (checkout / "fastdeploy/config.py").exists():
        sys.exit(f"{checkout}: no fastdeploy/config.py; allowed: a checkout of PaddlePaddle/FastDeploy")
    sys.meta_path.insert(0, Finder(checkout.resolve()))
    keep_off_the_gpu()
