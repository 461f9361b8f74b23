// Two answers about one photo: the one that was held on the left of a slider, the present one on the right.

const NAMES = {prompt_denoising: "denoising", key_smoothing: "smoothing", background_threshold: "background threshold"};

const text = (value) => (value === null || value === "" || value === undefined ? "off" : String(value));

export class Comparison {
  // `$` finds an element by its id.
  constructor($) {
    this.$ = $;
    this.held = null;
  }

  // Holds what is shown now, or lets go of what is held.
  toggle({drawing, colours, question}, paint) {
    this.held = this.held ? null : {drawing, colours, question};
    this.$("hold").textContent = this.held ? "Stop comparing" : "Compare";
    paint();
  }

  // Draws what is held over the canvas, unless it is of another photo, or a heat map is shown.
  paint({question}, opacity) {
    if (this.held && this.held.question.image !== question.image) this.toggle({}, () => {});
    const shown = this.held !== null && this.$("heat").hidden;
    for (const id of ["held", "split-label", "difference"]) this.$(id).hidden = !shown;
    if (!shown) return;
    this.held.drawing.draw(this.$("held"), this.held.colours, opacity);
    this.split();
    const changed = Object.keys({...this.held.question, ...question})
      .filter((key) => text(this.held.question[key]) !== text(question[key]));
    const side = (asked) => changed.map((key) => `${NAMES[key] ?? key} ${text(asked[key])}`).join(", ");
    this.$("difference").textContent = changed.length
      ? `Left: ${side(this.held.question)}. Right: ${side(question)}.`
      : "Both are the same as yet: change a setting.";
  }

  // The slider: what is held shows up to there.
  split() {
    this.$("held").style.clipPath = `inset(0 ${100 * (1 - Number(this.$("split").value))}% 0 0)`;
  }
}
