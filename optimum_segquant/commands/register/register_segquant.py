"""Found by ``optimum-cli`` in the namespace ``optimum.commands.register``, which setup.cfg maps to this folder."""

from optimum_segquant.commands import SegQuantCommand

REGISTER_COMMANDS = [SegQuantCommand]
