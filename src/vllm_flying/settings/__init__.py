"""Settings of the plugin, given under `--additional-config '{"flying": {...}}'`. Pure: no torch, no vllm."""

from vllm_flying.settings.settings import (
    SWITCH_METHODS,
    URGENT_POLICIES,
    Settings,
    SettingsError,
    settings_from_vllm_config,
)

__all__ = ["SWITCH_METHODS", "URGENT_POLICIES", "Settings", "SettingsError", "settings_from_vllm_config"]
