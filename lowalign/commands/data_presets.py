"""`lowalign data presets`: what --data.preset knows, by name."""

from lowalign.config.commands import DataPresetsConfig
from lowalign.config.recipe import data_presets as files
from lowalign.data.rows.presets import load_preset, preset_file


def data_presets(config: DataPresetsConfig) -> None:
    """Run the command. Raises UserError for a name that is none."""
    if config.name is not None:
        load_preset(config.name)
        print(preset_file(config.name).read_text(encoding="utf-8"), end="")
        return
    names = files()
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {load_preset(name).about}")
