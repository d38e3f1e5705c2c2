// How fast an answer came, by the clock of the page: what the user sees, network included.

export class Pace {
  #started = performance.now();
  #first = null;
  #last = null;
  #pieces = 0;
  #moments = 0; // at which pieces came
  #tokens = null;

  piece() {
    const now = performance.now();
    if (this.#last === null || now - this.#last > 1) this.#moments += 1;
    this.#last = now;
    this.#first ??= now;
    this.#pieces += 1;
  }

  usage({ completion_tokens: tokens }) {
    if (Number.isInteger(tokens)) this.#tokens = tokens;
  }

  // A server tells the number of tokens at the end only. Before that, and for a stopped answer, it
  // is the number of pieces of text, which is nearly the same, and marked as such.
  toString() {
    if (this.#first === null) return "";
    const exact = this.#tokens !== null;
    const tokens = exact ? this.#tokens : this.#pieces;
    const about = exact ? "" : "about ";
    const seconds = (this.#last - this.#first) / 1000;
    const parts = [`${about}${tokens.toLocaleString("en")} ${tokens === 1 ? "token" : "tokens"}`];
    // A proxy, or a browser that is busy, may deliver everything in one heap: then the clock tells
    // only the time of the whole. A server that drafts sends heaps too, but all the time.
    const whole = (this.#last - this.#started) / 1000;
    if (2 * this.#moments < this.#pieces && 2 * seconds < whole) {
      parts.push(`${rate(tokens / whole)} tokens/s with reading`, `in ${whole.toFixed(2)} s`);
      return parts.join(" · ");
    }
    // The first token ends the reading of the prompt: the rate is that of the others.
    if (tokens > 1 && seconds > 0) parts.push(`${rate((tokens - 1) / seconds)} tokens/s`);
    parts.push(`first after ${((this.#first - this.#started) / 1000).toFixed(2)} s`);
    return parts.join(" · ");
  }
}

const rate = (value) => (value < 100 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));
