"""Texts of many kinds, on which the mask of virtual tokens is made and measured: two sets that share none."""

from __future__ import annotations

FITTED = (
    "The film was a quiet triumph, and the last scene stayed with me for days.",
    "Terrible. The zip broke after a week and nobody answered my letters.\nSentiment: negative",
    "Parliament voted on Tuesday to raise the tax on fuel by two percent, its third rise in as many years.",
    "Question: Which river flows through Vienna?\nAnswer: The Danube.",
    "import math\n\ndef area(radius: float) -> float:\n    return math.pi * radius**2\n",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"], "alive": false}',
    "Der Zug nach München fährt heute von Gleis sieben ab, mit zehn Minuten Verspätung.",
    "Le chat dort sur le rebord de la fenêtre pendant que la pluie tombe.",
    "Мы встретились на вокзале рано утром и поехали к морю.",
    "今日は天気がいいので、公園まで歩いて行きました。",
    "这本书讲述了一个小镇在战争年代的故事。",
    "كان الطقس جميلا في المدينة هذا الصباح.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144",
    "<p>Dear customer,</p>\n<ul>\n  <li>order 4711</li>\n</ul>",
    "no no no no no no no no no no no no no no no no",
    "\n\n\n\n- one\n- two\n\n\t\tthree",
    "user: hi there\nassistant: Hello! How can I help you today?\nuser: tell me a joke",
    "∀x ∈ ℝ: x² ≥ 0, and e^{iπ} + 1 = 0 🙂",
)
HELD_OUT = (
    "A dull sequel; two hours that I will not get back. =>",
    "The committee found no evidence of fraud, but asked for better records of who was paid.",
    "Q: What is the boiling point of water at sea level?\nA:",
    "class Stack<T> {\n  private items: T[] = [];\n  push(x: T) { this.items.push(x); }\n}",
    "SELECT name, COUNT(*) FROM orders WHERE paid = 1 GROUP BY name;",
    "La biblioteca cierra a las ocho, pero los sábados abre hasta las diez.",
    "Привет, как дела? Сегодня был длинный день.",
    "日本語のテキストを読むのは楽しいです。",
    "2024-05-17 03:12:55 ERROR worker[12]: timeout after 30000 ms",
    "the the the the the the the the the the the the",
    "\n" * 20,
    "zxqv jkwp 8f3a-99e1 ~~~ !!! ???",
)
