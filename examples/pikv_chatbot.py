"""A chat bot whose memory is compressed by a router of experts: PiKVpress's example, on the bundled model."""

from transformers import pipeline

from kvzip.integrations.kvpress import MoERouterPress
from kvzip.model.loading import bundled_path


class ChatBot:
    """Answers questions about what it was told, from half of the memory that this would take."""

    def __init__(self, model: str, press: MoERouterPress, turns: int = 10) -> None:
        self.pipe = pipeline("kv-press-text-generation", model=model, device="cpu")
        self.press, self.turns = press, turns
        self.history: list[str] = []

    def tell(self, text: str) -> None:
        """Remember something; old things are forgotten."""
        self.history = [*self.history, text][-self.turns :]

    def chat(self, question: str) -> str:
        """Answer from what is remembered."""
        memory = " ".join(self.history)
        return self.pipe(memory, question=f"\n\n{question}", press=self.press, max_new_tokens=16)["answer"]


# Two methods that agree well; the router, which nobody trained here, deals the tokens out to them.
press = MoERouterPress(compression_ratio=0.5, router_type="pikv", num_experts=2, experts=("kvzip", "gate"))
bot = ChatBot(str(bundled_path()), press)
bot.tell("My name is Ada Moreno. I live in Lisbon.")
print("Where do I live? ->", bot.chat("Where do I live?"))
bot.tell("I work as a baker. Omar lives in Oslo.")
bot.tell("The red box holds 4417. The green box holds 9052.")
for question in ("What is my name?", "What is my job?", "Where does Omar live?", "What does the red box hold?"):
    print(question, "->", bot.chat(question))

stats = bot.press.get_stats()
print(f"balance loss {stats['avg_aux_loss']:.2f} over {stats['forward_count']} layers of contexts")
for layer, found in stats["layer_stats"].items():
    rates = found["expert_compression_stats"]["cache_hit_rates"].tolist()
    print(f"layer {layer}: attention that each expert alone would have kept", [round(one, 2) for one in rates])
