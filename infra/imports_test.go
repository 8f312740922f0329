// Package infra_test answers the question "do imports point inwards?".
package infra_test

import (
	"encoding/json"
	"os/exec"
	"slices"
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

func TestImportsPointInwards(t *testing.T) {
	command := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Imports", "wharf/...")
	out, err := command.Output()
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for list := json.NewDecoder(strings.NewReader(string(out))); list.More(); {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := list.Decode(&p); err != nil {
			t.Fatal(err)
		}
		layer := layerOf(p.ImportPath)
		seen[layer] = true
		inner, known := allowed[layer]
		if !known {
			t.Errorf("%s is in no layer", p.ImportPath)
		}
		for _, path := range p.Imports {
			ours := strings.HasPrefix(path, "wharf/")
			switch {
			case ours && !slices.Contains(inner, layerOf(path)):
				t.Errorf("%s imports %s: imports point inwards", p.ImportPath, path)
			case !ours && layer == "domain" && strings.Contains(path, ".") && path != "github.com/google/uuid":
				t.Errorf("%s imports %s: the domain needs no library", p.ImportPath, path)
			}
		}
	}
	if len(seen) != len(allowed) {
		t.Errorf("only the layers %v were looked at", seen)
	}
}

func layerOf(path string) string {
	layer, _, _ := strings.Cut(strings.TrimPrefix(path, "wharf/"), "/")
	return layer
}
