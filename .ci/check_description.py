"""Says which links of a wheel's description lead nowhere on a package index: those that are no URLs."""

import re
import sys
import zipfile
from email import message_from_bytes

with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    text = message_from_bytes(wheel.read(name)).get_payload()
links = re.findall(r"\]\(((?!https?://)[^)]*)\)", text)
sys.exit(f"The description of {sys.argv[1]} links to {links}" if links or not text.strip() else 0)
