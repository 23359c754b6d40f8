"""Objects to plain values and back, every bit of them."""

from clstream.serialization.capture import capture as capture
from clstream.serialization.encoding import CaptureError as CaptureError
from clstream.serialization.restore import restore as restore
