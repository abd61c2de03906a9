"""The underlay interface: asked for, chosen, and explained."""

from tundp.linux.iface.ask import look as look
from tundp.linux.iface.ask import read_host as read_host
from tundp.linux.iface.ask import relook as relook
from tundp.linux.iface.ask import targets_of as targets_of
from tundp.linux.iface.ask import ways_to as ways_to
from tundp.linux.iface.model import Host as Host
from tundp.linux.iface.model import Interface as Interface
from tundp.linux.iface.model import Selection as Selection
