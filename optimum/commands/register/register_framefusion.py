"""Where optimum-cli looks for `export framefusion`. The folders are a namespace of optimum's: none has __init__.py."""

from optimum.commands.export.base import ExportCommand

from framefusion.export.commands.optimum import FrameFusionExportCommand

REGISTER_COMMANDS = [(FrameFusionExportCommand, ExportCommand)]
