// Package infra_test answers the question "do imports point inwards?".
package infra_test

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// allowed says what of ours a layer may import; tests may import anything. The domain may use nothing but the standard
// library and uuid beside that.
var allowed = map[string][]string{
	"domain":      {"domain"},
	"commands":    {"commands", "domain"},
	"projections": {"projections", "domain"},
	"infra":       {"infra", "projections", "commands", "domain"},
	"cmd":         {"cmd", "infra", "projections", "commands", "domain"},
}

// The files are read here and not by a `go list`: so the go command knows what this test depends on, and does not take
// its result from the cache when they have changed.
func TestImportsPointInwards(t *testing.T) {
	seen := map[string]bool{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (len(d.Name()) > 2 && d.Name()[0] == '.' || d.Name() == "testdata"):
			return fs.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		path = filepath.ToSlash(path)
		layer := layerOf(strings.TrimPrefix(path, "../"))
		seen[layer] = true
		inner, known := allowed[layer]
		if !known {
			t.Errorf("%s is in no layer", path)
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			ours := strings.HasPrefix(imported, "wharf/")
			switch {
			case ours && !slices.Contains(inner, layerOf(strings.TrimPrefix(imported, "wharf/"))):
				t.Errorf("%s imports %s: imports point inwards", path, imported)
			case !ours && layer == "domain" && strings.Contains(imported, ".") && imported != "github.com/google/uuid":
				t.Errorf("%s imports %s: the domain needs no library", path, imported)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(seen) != len(allowed) {
		t.Errorf("only the layers %v were looked at", seen)
	}
}

// layerOf is the first element of a path in the module.
func layerOf(path string) string {
	layer, _, _ := strings.Cut(path, "/")
	return layer
}
