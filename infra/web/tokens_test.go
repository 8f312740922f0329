package web

import (
	"encoding/base64"
	"net/http"
	"strings"
	"testing"
)

func TestTokensAreOpaqueAndChecked(t *testing.T) {
	const here, there = Installation("orders.events=1"), Installation("orders.events=2")
	const position = "orders.events/3/17"
	token := here.seal(position)
	if strings.Contains(token, "/") || strings.Contains(token, "orders") {
		t.Errorf("the token tells what it is: %s", token)
	}
	if got, wrong := here.open(token); got != position || wrong != "" {
		t.Errorf("opened: %q, %q", got, wrong)
	}
	if _, wrong := there.open(token); !strings.Contains(wrong, "another installation") {
		t.Errorf("elsewhere: %q", wrong)
	}
	data, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		t.Fatal(err)
	}
	for i := range data {
		data[i] ^= 1
		if got, wrong := here.open(base64.RawURLEncoding.EncodeToString(data)); wrong == "" {
			t.Errorf("with byte %d changed it is %q", i, got)
		}
		data[i] ^= 1
	}
	for _, bad := range []string{"", "x", position, token[:8], token + "A", strings.Repeat("A", 1000)} {
		if got, wrong := here.open(bad); wrong == "" {
			t.Errorf("%q is %q", bad, got)
		}
	}
	r := &http.Request{Method: http.MethodGet, Header: http.Header{tokenHeader: {token, token}}}
	if p := here.openToken(r); p == nil {
		t.Error("two tokens are one")
	}
}
