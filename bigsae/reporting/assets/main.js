// Puts the page together.

const content = JSON.parse(document.getElementById('content').textContent);
const hidden = new Set();
const state = {log: true, more: false, redraw};

function redraw() {
  document.getElementById('curves').replaceWith(learning(content, hidden, state));
  document.getElementById('distributions').replaceWith(distributions(content, hidden));
}

const links = [['curves', 'Curves'], ['distributions', 'Distributions'], ['latents', 'Latents'], ['costs', 'Costs'], ['options', 'Options']];
document.title = `${content.runs.map((run) => run.label).join(', ')} – bigsae report`;
document.getElementById('app').replaceChildren(
  heading(content),
  h('nav', {'aria-label': 'Sections'}, links.map(([id, name]) => h('a', {href: `#${id}`}, name))),
  h('main', {}, numbers(content, hidden, redraw), learning(content, hidden, state), distributions(content, hidden),
    latentBrowser(content), costs(content), options(content)),
  h('footer', {}, `bigsae ${content.version}`));
if (/^#[a-z]+$/.test(location.hash)) document.querySelector(location.hash)?.scrollIntoView();
