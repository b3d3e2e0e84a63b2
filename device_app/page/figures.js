// Numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB"];

/** 1536 → "1.5 KiB" */
export function bytes(count) {
  let power = 0;
  while (count >= 1000 && power < UNITS.length - 1) {
    count /= 1024;
    power += 1;
  }
  return `${power === 0 || count >= 99.95 ? Math.round(count) : count.toFixed(1)} ${UNITS[power]}`;
}

/** An answer's figures in half a line. */
export function brief(figures) {
  const speed = figures.tokens_per_second ? ` · ${figures.tokens_per_second.toFixed(1)} tokens/s` : "";
  return `${figures.tokens} ${figures.tokens === 1 ? "token" : "tokens"}${speed}`;
}

/** The middle one. */
export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : 0;
}
