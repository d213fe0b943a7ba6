"""Reading with strict validation and one-line errors; atomic writing."""

from minrnn.files.claims import InUseError as InUseError
from minrnn.files.claims import claim as claim
from minrnn.files.claims import fresh_directory as fresh_directory
from minrnn.files.claims import fresh_file as fresh_file
from minrnn.files.claims import lock as lock
from minrnn.files.fields import as_python as as_python
from minrnn.files.fields import check_bounds as check_bounds
from minrnn.files.fields import check_types as check_types
from minrnn.files.fields import require as require
from minrnn.files.reading import naming as naming
from minrnn.files.reading import parse_json as parse_json
from minrnn.files.reading import parse_toml as parse_toml
from minrnn.files.reading import read_json as read_json
from minrnn.files.reading import read_json_lines as read_json_lines
from minrnn.files.reading import read_toml as read_toml
from minrnn.files.schema import convert as convert
from minrnn.files.schema import nearest as nearest
from minrnn.files.schema import shown as shown
from minrnn.files.writing import behind_link as behind_link
from minrnn.files.writing import find_directory as find_directory
from minrnn.files.writing import locate as locate
from minrnn.files.writing import recover_directory as recover_directory
from minrnn.files.writing import replace_text as replace_text
from minrnn.files.writing import write_directory as write_directory
from minrnn.files.writing import write_file as write_file
from minrnn.files.writing import write_json as write_json
