"""Where common architectures keep their attention and feed-forward linears, for :class:`RecipeSearcher`.

The names are those of transformers 5: model type -> class name -> paths below a module of that class, in the order
query, key, value, output (or fused, output), and first linears, last linear.
"""

RECIPES: dict[str, dict[str, list[str]]] = {
    "bert": {
        "BertAttention": ["self.query", "self.key", "self.value", "output.dense"],
        "BertLayer": ["intermediate.dense", "output.dense"],
    },
    "roberta": {
        "RobertaAttention": ["self.query", "self.key", "self.value", "output.dense"],
        "RobertaLayer": ["intermediate.dense", "output.dense"],
    },
    "distilbert": {
        "DistilBertSelfAttention": ["q_lin", "k_lin", "v_lin", "out_lin"],
        "FFN": ["lin1", "lin2"],
    },
    "albert": {
        "AlbertAttention": ["query", "key", "value", "dense"],
        "AlbertLayer": ["ffn", "ffn_output"],
    },
    "electra": {
        "ElectraAttention": ["self.query", "self.key", "self.value", "output.dense"],
        "ElectraLayer": ["intermediate.dense", "output.dense"],
    },
    "t5": {
        "T5Attention": ["q", "k", "v", "o"],
        "T5DenseActDense": ["wi", "wo"],
        "T5DenseGatedActDense": ["wi_0", "wi_1", "wo"],
    },
    "bart": {
        "BartAttention": ["q_proj", "k_proj", "v_proj", "out_proj"],
        "BartEncoderLayer": ["fc1", "fc2"],
        "BartDecoderLayer": ["fc1", "fc2"],
    },
    "gpt2": {
        "GPT2Attention": ["c_attn", "c_proj"],
        "GPT2MLP": ["c_fc", "c_proj"],
    },
    "opt": {
        "OPTAttention": ["q_proj", "k_proj", "v_proj", "out_proj"],
        "OPTDecoderLayer": ["fc1", "fc2"],
    },
    "gptj": {
        "GPTJAttention": ["q_proj", "k_proj", "v_proj", "out_proj"],
        "GPTJMLP": ["fc_in", "fc_out"],
    },
    "gpt_neox": {
        "GPTNeoXAttention": ["query_key_value", "dense"],
        "GPTNeoXMLP": ["dense_h_to_4h", "dense_4h_to_h"],
    },
    "llama": {
        "LlamaAttention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "LlamaMLP": ["gate_proj", "up_proj", "down_proj"],
    },
    "mistral": {
        "MistralAttention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "MistralMLP": ["gate_proj", "up_proj", "down_proj"],
    },
    "qwen2": {
        "Qwen2Attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "Qwen2MLP": ["gate_proj", "up_proj", "down_proj"],
    },
    "phi3": {
        "Phi3Attention": ["qkv_proj", "o_proj"],
        "Phi3MLP": ["gate_up_proj", "down_proj"],
    },
    "mixtral": {
        "MixtralAttention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    },
    "deberta-v2": {
        "DebertaV2Attention": ["self.query_proj", "self.key_proj", "self.value_proj", "output.dense"],
        "DebertaV2Layer": ["intermediate.dense", "output.dense"],
    },
    "xlm-roberta": {
        "XLMRobertaAttention": ["self.query", "self.key", "self.value", "output.dense"],
        "XLMRobertaLayer": ["intermediate.dense", "output.dense"],
    },
    "gemma": {
        "GemmaAttention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "GemmaMLP": ["gate_proj", "up_proj", "down_proj"],
    },
    "gemma2": {
        "Gemma2Attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "Gemma2MLP": ["gate_proj", "up_proj", "down_proj"],
    },
    "qwen3": {
        "Qwen3Attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "Qwen3MLP": ["gate_proj", "up_proj", "down_proj"],
    },
    "phi": {
        "PhiAttention": ["q_proj", "k_proj", "v_proj", "dense"],
        "PhiMLP": ["fc1", "fc2"],
    },
    "whisper": {
        "WhisperAttention": ["q_proj", "k_proj", "v_proj", "out_proj"],
        "WhisperEncoderLayer": ["fc1", "fc2"],
        "WhisperDecoderLayer": ["fc1", "fc2"],
    },
    "bloom": {
        "BloomAttention": ["query_key_value", "dense"],
        "BloomMLP": ["dense_h_to_4h", "dense_4h_to_h"],
    },
    "falcon": {
        "FalconAttention": ["query_key_value", "dense"],
        "FalconMLP": ["dense_h_to_4h", "dense_4h_to_h"],
    },
    "vit": {
        "ViTAttention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "ViTMLP": ["fc1", "fc2"],
    },
    "swin": {
        "SwinAttention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "SwinMLP": ["fc1", "fc2"],
    },
    "convnext": {
        "ConvNextLayer": ["pwconv1", "pwconv2"],
    },
}
"""Model type, as its configuration says it -> recipe."""
