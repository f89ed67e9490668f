// Elements, numbers as text, and the one tooltip. Texts reach the page as text nodes alone, never as markup.

const SVG = 'http://www.w3.org/2000/svg';

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name === 'style') Object.entries(value).forEach(([key, v]) => element.style.setProperty(key, v));
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const h = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
const svg = (tag, properties, ...children) => fill(document.createElementNS(SVG, tag), properties, children);

function number(value, digits = 3) {
  if (value === null || value === undefined) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e7) {
    const [mantissa, power] = value.toExponential(digits - 1).split('e');
    return `${Number(mantissa)}e${Number(power)}`;
  }
  if (size >= 10 ** digits) return Math.round(value).toLocaleString('en-US');
  return String(Number(value.toPrecision(digits)));
}

function percent(value) {
  if (value === null || value === undefined) return '–';
  return `${number(100 * value)} %`;
}

function scaled(value, digits = 3) {
  for (const [unit, size] of [['B', 1e9], ['M', 1e6], ['k', 1e3]]) {
    if (Math.abs(value) >= size) return number(value / size, digits) + unit;
  }
  return number(value, digits);
}

const count = (value) => Math.round(value).toLocaleString('en-US');

function bytes(value) {
  for (const [unit, size] of [['GiB', 2 ** 30], ['MiB', 2 ** 20], ['KiB', 2 ** 10]]) {
    if (value >= size) return `${number(value / size)} ${unit}`;
  }
  return `${value} B`;
}

function duration(seconds) {
  if (seconds >= 5400) return `${number(seconds / 3600)} h`;
  if (seconds >= 90) return `${number(seconds / 60)} min`;
  return `${number(seconds)} s`;
}

const tooltip = {
  element: null,
  show(x, y, ...content) {
    this.element ||= document.body.appendChild(h('div', {class: 'tooltip', role: 'presentation'}));
    this.element.replaceChildren(...content);
    this.element.hidden = false;
    const box = this.element.getBoundingClientRect();
    const left = x + 14 + box.width > innerWidth ? x - 14 - box.width : x + 14;
    const top = y + 14 + box.height > innerHeight ? y - 14 - box.height : y + 14;
    this.element.style.left = `${Math.max(4, left)}px`;
    this.element.style.top = `${Math.max(4, top)}px`;
  },
  hide() {
    if (this.element) this.element.hidden = true;
  },
};

const NUM_COLORS = 8;
const color = (index) => `var(--series-${index % NUM_COLORS})`;
// Past the last colour they come again, dashed.
const dashes = (index) => (index >= NUM_COLORS ? '5 3' : 'none');

function swatch(index) {
  return svg('svg', {class: 'swatch', width: 18, height: 10, 'aria-hidden': 'true'},
    svg('line', {x1: 1, x2: 17, y1: 5, y2: 5, style: {stroke: color(index), 'stroke-dasharray': dashes(index)}}));
}
