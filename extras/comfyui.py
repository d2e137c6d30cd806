"""The graph of nodes that ComfyUI writes into a PNG -> prompts and settings under A1111's names.

A graph is {id: {"class_type": name, "inputs": {name: value or [id of a node, number]}}}. What is
understood: one KSampler, its two texts, an empty latent picture, a checkpoint and LoRAs. All nodes
that were not looked at on the way are named in a note.
"""
import re

from sd import UserError

SAMPLERS = {"KSampler": "seed", "KSamplerAdvanced": "noise_seed"}
VALUES = ("value", "text", "string", "int", "float", "seed", "Text", "String")  # of simple nodes
LOADERS = ("CheckpointLoaderSimple", "CheckpointLoader", "UNETLoader", "CLIPLoader",
           "DualCLIPLoader")
DEPTH = 200     # of nodes, so that circles end
HARMLESS = re.compile("(Save|Preview|Show|Load|Empty|VAEDecode$|VAEEncode$|Primitive|Reroute)"
                      "|.*Note$")


class Graph:
    def __init__(self, nodes: dict):
        self.nodes = {str(key): node for key, node in nodes.items()
                      if isinstance(node, dict) and isinstance(node.get("inputs"), dict)}
        self.notes: list[str] = []
        self.seen: set[str] = set()             # nodes that are followed
        self.readers: list[list[str]] = []      # of each text: the nodes of its text encoder

    def node(self, link: object) -> dict:
        """The node that a link leads to. Raises UserError if there is none."""
        for _ in range(DEPTH):
            if not is_link(link) or str(link[0]) not in self.nodes:
                break
            found = self.nodes[str(link[0])]
            self.seen.add(str(link[0]))
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
        self.readers.append(self.chain(inputs.get("clip"), "clip"))
        return found

    def chain(self, link: object, name: str) -> list[str]:
        """The numbers of the nodes that a link leads to, one behind the other."""
        found = []
        while is_link(link) and len(found) < DEPTH:
            node = self.node(link)
            found.append(next(key for key, one in self.nodes.items() if one is node))
            link = node["inputs"].get(name)
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

    def vae(self, fields: dict[str, str]) -> None:
        """A VAE that is not the checkpoint's."""
        for node in self.nodes.values():
            link = node["inputs"].get("vae")
            if "VAEDecode" in str(node.get("class_type")) and is_link(link):
                loader = self.node(link)
                if loader.get("class_type") not in LOADERS:
                    fields["VAE"] = str(self.value(loader["inputs"].get("vae_name")))

    def steps(self, inputs: dict) -> None:
        """Notes if a sampler ran a part of its steps, or on noise that was there already."""
        steps, last = self.value(inputs.get("steps")), self.value(inputs.get("end_at_step"))
        if self.value(inputs.get("start_at_step", 0)) != 0:
            self.notes.append("the sampler began at a later step, which is not followed")
        if isinstance(last, int) and isinstance(steps, int) and last < steps:
            self.notes.append("the sampler ended at an earlier step, which is not followed")
        if self.value(inputs.get("add_noise", "enable")) != "enable":
            self.notes.append("the sampler added no noise, which is not followed")

    def readers_of(self, model: list[str]) -> None:
        """Notes on text encoders that are not the checkpoint's, or not the same for both texts."""
        if any(reader != self.readers[0] for reader in self.readers):
            self.notes.append("prompt and negative prompt are read by different text encoders, "
                              "which is not followed")
        loras = {key for key, node in self.nodes.items() if node.get("class_type") == "LoraLoader"}
        for reader in self.readers[:1]:
            uneven = any(self.value(self.nodes[key]["inputs"].get("strength_clip"))
                         != self.value(self.nodes[key]["inputs"].get("strength_model"))
                         for key in loras.intersection(model))
            if uneven or loras & set(model) != loras & set(reader):
                self.notes.append("a LoRA changes UNet and text encoder in different measure, "
                                  "which --lora does not")
            for key in reader:
                kind = str(self.nodes[key].get("class_type"))
                if kind not in ("LoraLoader", "CLIPSetLastLayer", *LOADERS[:2]):
                    self.notes.append(f"the node {kind[:60]} changes the text encoder, and is not "
                                      "followed")

    def left_over(self) -> None:
        """A note on nodes that nothing looked at."""
        kinds = dict.fromkeys(
            str(node.get("class_type"))[:60] for key, node in self.nodes.items()
            if key not in self.seen and not HARMLESS.match(str(node.get("class_type"))))
        if kinds:
            more = ", ..." if len(kinds) > 5 else ""
            self.notes.append(f"nodes that are not followed: {', '.join(list(kinds)[:5])}{more}")

    def clip_skip(self) -> int | None:
        for node in (self.nodes[key] for reader in self.readers[:1] for key in reader):
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
            if denoise != 1:
                self.notes.append(f"only the last {str(denoise)[:20]} of the noise levels were run "
                                  "(denoise), which is not followed")
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
    graph.seen |= {key for key, node in graph.nodes.items() if node is samplers[0]}
    inputs = samplers[0]["inputs"]
    prompt, negative = graph.text(inputs.get("positive")), graph.text(inputs.get("negative"))
    names = {"Steps": "steps", "Sampler": "sampler_name", "Schedule type": "scheduler",
             "CFG scale": "cfg", "Seed": SAMPLERS[samplers[0]["class_type"]]}
    fields = {name: str(graph.value(inputs[theirs])) for name, theirs in names.items()
              if theirs in inputs}
    fields["Version"] = "ComfyUI"   # whose samplers have the names that they have here
    graph.latents(inputs.get("latent_image"), fields, graph.value(inputs.get("denoise", 1.0)))
    graph.model(inputs.get("model"), fields)
    graph.vae(fields)
    graph.readers_of(graph.chain(inputs.get("model"), "model"))
    graph.steps(inputs)
    skip = graph.clip_skip()
    if skip is not None:
        fields["Clip skip"] = str(skip)
    graph.left_over()
    return prompt, negative, fields, "ComfyUI", graph.notes
