// The words: typed freely, completed from the class sets, or filled in from one of them.

const MARKS = [",", ";", "\n"];
const SHOWN = 8;

export class Words {
  // `box` is the text area, `ask` is called with a delay in ms when the words have changed.
  constructor(box, suggestions, choice, classSets, ask) {
    Object.assign(this, {box, suggestions, classSets, ask});
    const words = Object.values(classSets).flat().flatMap((entry) => entry.split(", "));
    this.known = [...new Set(words.map((word) => word.toLowerCase()))].sort((a, b) => a.length - b.length);
    choice.append(...Object.keys(classSets).map((name) => new Option(name, name)));
    box.addEventListener("input", () => {
      this.suggest();
      ask(500); // nobody wants an answer to half a word
    });
    choice.addEventListener("change", () => {
      if (choice.value) this.fillIn(choice.value);
      choice.value = "";
    });
  }

  // What is sent: line breaks separate as the other separator in use does.
  text() {
    return this.box.value.trim().replaceAll(/\s*\n\s*/g, this.box.value.includes(";") ? ";" : ",");
  }

  last() {
    const text = this.box.value;
    const start = Math.max(...MARKS.map((mark) => text.lastIndexOf(mark))) + 1;
    return {start, word: text.slice(start).trim().toLowerCase()};
  }

  suggest() {
    const {word} = this.last();
    const others = word ? this.known.filter((known) => known !== word) : [];
    const starting = others.filter((known) => known.startsWith(word));
    const holding = others.filter((known) => !known.startsWith(word) && known.includes(word));
    this.suggestions.replaceChildren(...[...starting, ...holding].slice(0, SHOWN).map((known) => {
      const button = Object.assign(document.createElement("button"), {type: "button", textContent: known});
      button.addEventListener("click", () => this.complete(known));
      return button;
    }));
  }

  complete(known) {
    const {start} = this.last();
    this.box.value = this.box.value.slice(0, start) + (start ? " " : "") + known;
    this.box.focus();
    this.suggest();
    this.ask(0);
  }

  fillIn(name) {
    const words = this.classSets[name];
    this.box.value = words.join(words.some((entry) => entry.includes(",")) ? "; " : ", ");
    this.suggest();
    this.ask(0);
  }
}
