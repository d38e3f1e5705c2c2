// Values as JSON in a storage of the browser. A browser that blocks storage throws on access, and
// anyone may have changed what is there: both count as nothing stored.

function read(name, key) {
  try {
    return JSON.parse(window[name].getItem(key));
  } catch {
    return null;
  }
}

function write(name, key, value) {
  try {
    if (value === null) window[name].removeItem(key);
    else window[name].setItem(key, JSON.stringify(value));
  } catch {
    // blocked or full: the value lasts as long as the page
  }
}

const slot = (name, key) => ({
  read: () => read(name, `llama-onnx.${key}`),
  write: (value) => write(name, `llama-onnx.${key}`, value),
});

// The conversation and the key end with the tab; settings stay.
export const storedChat = slot("sessionStorage", "chat");
export const storedKey = slot("sessionStorage", "key");
export const storedSettings = slot("localStorage", "settings");
