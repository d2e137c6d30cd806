"""The graph of nodes that ComfyUI writes into a PNG -> prompts and settings under A1111's names.

A graph is {id: {"class_type": name, "inputs": {name: value or [id of a node, number]}}}. What is
understood: one KSampler, its two texts, an empty latent picture, a checkpoint and LoRAs.
"""
from sd import UserError

SAMPLERS = {"KSampler": "seed", "KSamplerAdvanced": "noise_seed"}
VALUES = ("value", "text", "string", "int", "float", "seed", "Text", "String")  # of simple nodes
LOADERS = ("CheckpointLoaderSimple", "CheckpointLoader", "UNETLoader", "CLIPLoader",
           "DualCLIPLoader")
DEPTH = 200     # of nodes, so that circles end


class Graph:
    def __init__(self, nodes: dict):
        self.nodes = {str(key): node for key, node in nodes.items()
                      if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}
        self.notes: list[str] = []

    def node(self, link: object) -> dict:
        """The node that a link leads to. Raises UserError if there is none."""
        for _ in range(DEPTH):
            if not is_link(link) or str(link[0]) not in self.nodes:
                break
            found = self.nodes[str(link[0])]
            if found.get("class_type") not in ("Reroute", "PrimitiveNode"):
                return found
            link = next(iter(found["inputs"].values()), None)
        raise UserError("the graph of ComfyUI in this picture is not whole: give the prompt and "
                        "the settings as options")

    def value(self, value: object) -> object:
        """A number or text, directly or from a node that holds one."""
        for _ in range(DEPTH):
            if not is_link(value):
                return value
            inputs = self.node(value)["inputs"]
            value = next((inputs[name] for name in VALUES if name in inputs), None)
        return None

    def text(self, link: object) -> str:
        """The prompt that a sampler is given. Raises UserError if nodes stand between."""
        node = self.node(link)
        kind, inputs = node.get("class_type"), node["inputs"]
        if kind == "ConditioningZeroOut":
            return ""
        if kind == "CLIPTextEncodeSDXL" and inputs.get("text_g") == inputs.get("text_l"):
            found = self.value(inputs.get("text_g"))
        elif kind == "CLIPTextEncode":
            found = self.value(inputs.get("text"))
        else:
            found = None
        if not isinstance(found, str):
            raise UserError(f"the node {kind} between prompt and sampler is not understood: give "
                            "the prompt and the settings as options")
        return found

    def model(self, link: object, fields: dict[str, str]) -> None:
        """What stands between checkpoint and sampler."""
        loras = []
        for _ in range(DEPTH):
            node = self.node(link)
            kind, inputs = node.get("class_type"), node["inputs"]
            if kind in LOADERS:
                name = self.value(inputs.get("ckpt_name", inputs.get("unet_name")))
                fields["Model"] = str(name)
                break
            if kind in ("LoraLoader", "LoraLoaderModelOnly"):
                loras.append(f"{inputs.get('lora_name')}:{inputs.get('strength_model')}")
            elif kind != "CLIPSetLastLayer":
                self.notes.append(f"the node {kind} changes the model, and is not followed")
            link = inputs.get("model")
            if link is None:
                break
        if loras:
            fields["Lora"] = ", ".join(loras)

    def clip_skip(self) -> int | None:
        for node in self.nodes.values():
            if node.get("class_type") == "CLIPSetLastLayer":
                layer = node["inputs"].get("stop_at_clip_layer")
                return -layer if isinstance(layer, int) else None
        return None

    def latents(self, link: object, fields: dict[str, str], denoise: object) -> None:
        """The size of the empty picture, or that there was another picture."""
        node = self.node(link)
        inputs = node["inputs"]
        width, height = self.value(inputs.get("width")), self.value(inputs.get("height"))
        if "Empty" in str(node.get("class_type")) and isinstance(width, int) \
                and isinstance(height, int):
            fields["Size"] = f"{width}x{height}"
            if self.value(inputs.get("batch_size", 1)) != 1:
                self.notes.append("ComfyUI drew it as one of several, so its noise is another "
                                  "unless it was the first")
            return
        fields["Denoising strength"] = str(denoise)
        if node.get("class_type") != "VAEEncode":
            self.notes.append(f"the node {node.get('class_type')} in front of the sampler is not "
                              "followed")


def is_link(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, int))


def read_graph(nodes: dict) -> tuple[str, str, dict[str, str], str, list[str]]:
    """The parts of `png_info.Params`. Raises UserError for a graph that is not understood."""
    graph = Graph(dict(nodes))
    samplers = [node for node in graph.nodes.values() if node.get("class_type") in SAMPLERS]
    if not samplers:
        raise UserError("the graph of ComfyUI in this picture has no KSampler: give the prompt and "
                        "the settings as options")
    if len(samplers) > 1:
        graph.notes.append(f"{len(samplers)} samplers drew the picture one after the other: only "
                           "one is followed")
        samplers.sort(key=lambda node: "Empty" not in str(
            graph.node(node["inputs"].get("latent_image")).get("class_type")))
    inputs = samplers[0]["inputs"]
    prompt, negative = graph.text(inputs.get("positive")), graph.text(inputs.get("negative"))
    names = {"Steps": "steps", "Sampler": "sampler_name", "Schedule type": "scheduler",
             "CFG scale": "cfg", "Seed": SAMPLERS[samplers[0]["class_type"]]}
    fields = {name: str(graph.value(inputs[theirs])) for name, theirs in names.items()
              if theirs in inputs}
    graph.latents(inputs.get("latent_image"), fields, graph.value(inputs.get("denoise", 1.0)))
    graph.model(inputs.get("model"), fields)
    skip = graph.clip_skip()
    if skip is not None:
        fields["Clip skip"] = str(skip)
    if graph.value(inputs.get("start_at_step", 0)) != 0:
        graph.notes.append("the sampler began at a later step, which is not followed")
    return prompt, negative, fields, "ComfyUI", graph.notes
