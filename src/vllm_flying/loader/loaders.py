"""The two load formats of this plugin: `flying` for width 1, `flying_view` for every wider layout.

May import torch and vllm. `flying` reads the checkpoint with the loader the user chose, once. `flying_view` reads
nothing and allocates nothing.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader import get_model_loader, register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

from vllm_flying.compilation.concatenation import use_pass
from vllm_flying.core.topology import available_widths
from vllm_flying.loader.binding import bind_model
from vllm_flying.loader.cutting import check_supported, cut_model
from vllm_flying.loader.resident import ResidentWeights, keep_resident, resident_weights
from vllm_flying.settings import Settings, settings_from_vllm_config

logger = init_logger("vllm.flying.loader")

FULL_FORMAT = "flying"
VIEW_FORMAT = "flying_view"


def use_tiles(settings: Settings) -> bool:
    """Whether weights are held as tiles: where the device packs them (CPU), or where the settings ask for it."""
    return current_platform.is_cpu() if settings.weights == "auto" else settings.weights == "tiles"


@register_model_loader(FULL_FORMAT)
class FlyingModelLoader(BaseModelLoader):
    """Loads the width-1 model with the user's own loader, then cuts its layers into tiles."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self._settings: Settings | None = None
        self._num_tiles = 1

    def _loader(self) -> BaseModelLoader:
        assert self._settings is not None
        load_config = copy.copy(self.load_config)
        load_config.load_format = self._settings.load_format or "auto"
        return get_model_loader(load_config)

    def download_model(self, model_config: ModelConfig) -> None:
        """As the user's loader does."""
        self._loader().download_model(model_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Build and load the model; its weights are resident afterwards."""
        self._settings = settings_from_vllm_config(vllm_config)
        widths = available_widths(self._settings.num_engines, self._settings.widths)
        self._num_tiles = max(widths, default=1)
        use_pass(vllm_config)
        return super().load_model(vllm_config, model_config, prefix)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Read the checkpoint, then cut. Runs before vLLM packs the layers that were not cut."""
        self._loader().load_weights(model, model_config)
        assert self._settings is not None
        resident = ResidentWeights(model, self._num_tiles)
        if use_tiles(self._settings):
            maybe_retie_word_embeddings(model, model_config)
            cut_model(resident, blocked=self._settings.packing == "blocks")
            logger.info(
                "Weights cut into %d tiles per layer, %d of %d layers in blocks: %.1f MiB in tiles.",
                self._num_tiles, resident.layers_in_blocks(), len(resident.cut_layers), resident.tile_bytes() / 2**20,
            )  # fmt: skip
        else:
            for name, module in model.named_modules():
                check_supported(name, module)
                module._cpu_skip_gemm_dispatch = True  # vLLM's own flag: keep the weight as it was read
        keep_resident(resident)


@register_model_loader(VIEW_FORMAT)
class ViewModelLoader(BaseModelLoader):
    """Builds a wider layout's model on the meta device and binds it to the resident weights."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Nothing to download: the weights are resident."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Nothing to load: the weights are resident."""

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """The model of the layout whose communicators are in place."""
        resident = resident_weights()
        degree = vllm_config.parallel_config.tensor_parallel_size
        settings = settings_from_vllm_config(vllm_config)
        width = degree // settings.engine_tp
        position = get_tensor_model_parallel_rank() % width
        use_pass(vllm_config)
        with set_default_torch_dtype(model_config.dtype), torch.device("meta"):
            model = initialize_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        bind_model(model, resident, width, position)
        for module in model.modules():
            # The only layers whose post-processing isn't about weights.
            if is_deferred_attention_layer(module):
                module.process_weights_after_loading(model_config.dtype)
        return model.eval()
