package embedded

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
)

func TestOnlyTheRightProgramsAreTaken(t *testing.T) {
	if _, known := artifacts[platform()]; !known {
		t.Skip("no programs for", platform())
	}
	for name, c := range map[string]struct {
		serve http.HandlerFunc
		want  string
	}{
		"another file": {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("not it")) }, "SHA-256"},
		"none":         {http.NotFound, "404"},
	} {
		t.Run(name, func(t *testing.T) {
			asked := ""
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked = r.URL.Path
				c.serve(w, r)
			}))
			defer server.Close()
			t.Setenv(RepositoryVariable, server.URL+"/maven/")
			cache := t.TempDir()
			_, err := binaries(t.Context(), cache, slog.New(slog.DiscardHandler))
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("the error is: %v", err)
			}
			if !strings.HasPrefix(asked, "/maven/io/zonky/test/postgres/embedded-postgres-binaries-") {
				t.Errorf("it asked for %s", asked)
			}
			if left, _ := os.ReadDir(cache); len(left) != 1 || left[0].Name() != "lock" {
				t.Errorf("left in the cache: %v", left)
			}
		})
	}
}
