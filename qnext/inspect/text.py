"""Numbers and descriptions as people read them, shared by the terminal and the page."""

from qnext.config.model import ModelConfig

PART_TITLES = {
    "embedding": "Embedding",
    "attention": "Gated Attention",
    "delta_net": "Gated DeltaNet",
    "router": "Routers",
    "experts": "Experts",
    "shared_expert": "Shared experts",
    "dense_mlp": "Dense MLPs",
    "norms": "Norms",
    "head": "Output head",
    "mtp": "MTP head",
}


def format_bytes(num_bytes: int) -> str:
    """Returns bytes in the largest binary unit that keeps the number at 1 or more."""
    size, units = float(num_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{int(size)} {units[0]}" if size == int(size) else f"{size:,.2f} {units[0]}"


def format_count(count: int) -> str:
    """Returns a count in words of its size, such as 79.67 B."""
    for limit, unit in ((10**9, " B"), (10**6, " M"), (10**3, " K")):
        if count >= limit:
            return f"{count / limit:.2f}{unit}"
    return str(count)


def mixer_title(is_attention: bool) -> str:
    """Returns the name of a mixer."""
    return "Gated Attention" if is_attention else "Gated DeltaNet"


def mixer_detail(config: ModelConfig, is_attention: bool) -> str:
    """Returns heads and sizes of a mixer."""
    if is_attention:
        return (
            f"{config.num_attention_heads} query heads, {config.num_key_value_heads} key heads "
            f"× {config.head_dim}; {config.rotary_dim} of {config.head_dim} dimensions rotated, "
            f"θ = {config.rope.theta:,.0f}{_yarn(config)}"
        )
    key, value = config.linear_key_head_dim, config.linear_value_head_dim
    return (
        f"{config.linear_num_key_heads} key heads × {key}, "
        f"{config.linear_num_value_heads} value heads × {value}; "
        f"state {key} × {value} a head, convolution {config.linear_conv_kernel_dim}"
    )


def mlp_title(is_moe: bool) -> str:
    """Returns the name of a layer's second half."""
    return "Mixture of experts" if is_moe else "Dense MLP"


def mlp_detail(config: ModelConfig, is_moe: bool) -> str:
    """Returns sizes of a layer's second half."""
    if not is_moe:
        return f"width {config.intermediate_size:,}"
    shared = config.shared_expert_intermediate_size
    return (
        f"{config.num_experts_per_tok} of {config.num_experts} experts × "
        f"{config.moe_intermediate_size}" + (f" + 1 shared × {shared}" if shared else "")
    )


def _yarn(config: ModelConfig) -> str:
    return f", YaRN × {config.rope.factor:g}" if config.rope.rope_type == "yarn" else ""
