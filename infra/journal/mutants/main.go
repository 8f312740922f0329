// Command mutants answers the question "would the tests notice if a guarantee of the journal were gone?". Each .patch
// file beside it takes one guarantee away. The command builds the tests with each of them, by Go's -overlay, so that
// the checkout is not touched, and looks for a seed of the simulation that fails, or runs the test that the patch
// names. `make mutants` runs it from the root of the repository.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

// mutant is one patch. Its first lines say "Guarantee: …" and, where it applies, "Test: …" (a package and flags of
// go test, for what the simulation does not reach) or "Harmless: …" (why nothing can notice it).
type mutant struct {
	name, patch               string
	guarantee, test, harmless string
}

var (
	seeds    = flag.Int("seeds", 5000, "seeds that a mutant may survive")
	parallel = flag.Int("parallel", runtime.GOMAXPROCS(0)+1, "mutants at once; some wait for what does not come")
	only     = flag.String("only", "", "run the mutants whose names match this regular expression")
)

func main() {
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	all, err := read("infra/journal/mutants", *only)
	if err != nil {
		return err
	}
	var mu sync.Mutex
	counts := map[string]int{}
	attacks, ctx := errgroup.WithContext(ctx)
	attacks.SetLimit(*parallel)
	for _, m := range all {
		attacks.Go(func() error {
			began := time.Now()
			how, err := m.attack(ctx)
			if ctx.Err() != nil {
				return errors.New("interrupted")
			}
			fate := "caught"
			switch {
			case err != nil:
				fate, how = "SURVIVED", err.Error()
			case how == "" && m.harmless != "":
				fate, how = "harmless", m.harmless
			case how == "":
				fate, how = "SURVIVED", fmt.Sprint(*seeds, " seeds")
			case m.harmless != "":
				fate, how = "SURVIVED", how+", but it is said to be harmless"
			}
			mu.Lock()
			defer mu.Unlock()
			counts[fate]++
			fmt.Printf("%-28s ─▶ %-75s ─▶ %s: %s (%.0f s)\n", m.name, m.guarantee, fate, how, time.Since(began).Seconds())
			return nil
		})
	}
	if err := attacks.Wait(); err != nil {
		return err
	}
	fmt.Printf("mutants: %d caught, %d survived, %d harmless\n", counts["caught"], counts["SURVIVED"], counts["harmless"])
	if counts["SURVIVED"] > 0 {
		return errors.New("a mutant survived: a guarantee is not tested")
	}
	return nil
}

func read(dir, only string) (all []mutant, err error) {
	pattern, err := regexp.Compile(only)
	if err != nil {
		return nil, err
	}
	paths, err := filepath.Glob(filepath.Join(dir, "*.patch"))
	if err != nil || len(paths) == 0 {
		return nil, fmt.Errorf("no patches in %s: run this from the root of the repository (%w)", dir, err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		m := mutant{name: strings.TrimSuffix(filepath.Base(path), ".patch"), patch: string(text)}
		for line := range strings.Lines(m.patch) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			switch key {
			case "Guarantee":
				m.guarantee = value
			case "Test":
				m.test = value
			case "Harmless":
				m.harmless = value
			}
			if strings.HasPrefix(line, "---") {
				break
			}
		}
		if m.guarantee == "" {
			return nil, fmt.Errorf("%s names no guarantee", path)
		}
		if pattern.MatchString(m.name) {
			all = append(all, m)
		}
	}
	return all, nil
}

// attack says what caught the mutant, or nothing.
func (m mutant) attack(ctx context.Context) (how string, err error) {
	dir, err := os.MkdirTemp("", "mutant-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	overlay, err := m.overlay(ctx, dir)
	if err != nil {
		return "", err
	}
	test := m.test
	if test == "" {
		test = "./infra/journal -run ^TestSimulation$ -args -brief -seeds " + fmt.Sprint(*seeds)
	}
	// Vet is off because a mutant is not meant to be good code.
	args := append([]string{"test", "-count=1", "-vet=off", "-failfast", "-ldflags=-w", "-timeout=10m", "-overlay", overlay}, strings.Fields(test)...)
	command := exec.CommandContext(ctx, "go", args...)
	out, err := command.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return "", nil
	case !errors.As(err, &exit):
		return "", err
	case bytes.Contains(out, []byte("[build failed]")) || bytes.Contains(out, []byte("[setup failed]")):
		return "", fmt.Errorf("it does not compile:\n%s", out)
	case m.test != "":
		return regexp.MustCompile(`-run \S+`).FindString(m.test), nil
	}
	if seed := regexp.MustCompile(`seed (\d+): (.*)`).FindSubmatch(out); seed != nil {
		return fmt.Sprintf("seed %s, %.90s", seed[1], seed[2]), nil
	}
	return "", fmt.Errorf("the tests fail without a seed:\n%.4000s", out)
}

// overlay writes the files that the patch changes into dir, and says where go finds what replaces what.
func (m mutant) overlay(ctx context.Context, dir string) (path string, err error) {
	root, err := os.Getwd()
	if err != nil {
		return "", err
	}
	replace := map[string]string{}
	for _, name := range regexp.MustCompile(`(?m)^\+\+\+ b/(\S+)`).FindAllStringSubmatch(m.patch, -1) {
		text, err := os.ReadFile(name[1])
		if err != nil {
			return "", err
		}
		copied := filepath.Join(dir, name[1])
		if err := os.MkdirAll(filepath.Dir(copied), 0o755); err != nil {
			return "", err
		}
		if err := os.WriteFile(copied, text, 0o644); err != nil {
			return "", err
		}
		replace[filepath.Join(root, name[1])] = copied
	}
	apply := exec.CommandContext(ctx, "git", "apply", "-")
	apply.Dir, apply.Stdin = dir, strings.NewReader(m.patch)
	apply.Env = append(os.Environ(), "GIT_CEILING_DIRECTORIES="+filepath.Dir(dir))
	if out, err := apply.CombinedOutput(); err != nil {
		return "", fmt.Errorf("the patch does not apply any more: %s", out)
	}
	text, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	path = filepath.Join(dir, "overlay.json")
	return path, os.WriteFile(path, text, 0o644)
}
