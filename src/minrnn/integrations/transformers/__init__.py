"""Language models of minrnn in transformers: configuration, model, tokenizer, directories.

Importing this package registers them: `AutoModelForCausalLM.from_pretrained` then loads what
`minrnn export RUN DIR --format transformers` wrote.
"""

from minrnn.integrations.transformers.available import STATE_NAME as STATE_NAME
from minrnn.integrations.transformers.configuration import MinRNNConfig as MinRNNConfig
from minrnn.integrations.transformers.directory import check_free as check_free
from minrnn.integrations.transformers.directory import export_pretrained as export_pretrained
from minrnn.integrations.transformers.modeling import MinRNNForCausalLM as MinRNNForCausalLM
from minrnn.integrations.transformers.state import MinRNNState as MinRNNState
from minrnn.integrations.transformers.tokenizer import make_tokenizer as make_tokenizer
