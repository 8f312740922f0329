package infra_test

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestReadmeQuotesTheAcceptanceRule holds the README to its word: what it shows as the whole rule is the rule.
func TestReadmeQuotesTheAcceptanceRule(t *testing.T) {
	readme, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile("journal/accept.go")
	if err != nil {
		t.Fatal(err)
	}
	quotes := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllSubmatch(readme, -1)
	if len(quotes) == 0 {
		t.Fatal("the README quotes no code")
	}
	for _, q := range quotes {
		if !strings.Contains(string(source), string(q[1])) {
			t.Errorf("infra/journal/accept.go does not read as the README says:\n%s", q[1])
		}
	}
}
