//go:build bench

package bench_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"wharf/infra/embedded"
	"wharf/infra/embedded/apache"
	"wharf/infra/kafka"
)

// The test binary is also the other processes: it is started anew with a role, and its parameters as one argument. A
// process ends when its standard input does, however this one ends.
const roleVariable = "WHARF_BENCH_ROLE"

var roles = map[string]func() error{"broker": playBroker, "client": playClient}

func play(ctx context.Context, role, parameters string) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	c := exec.CommandContext(ctx, self, parameters)
	c.Env = append(os.Environ(), roleVariable+"="+role)
	c.Stderr = os.Stderr
	return c, nil
}

// playBroker runs the embedded broker in the directory, and prints its address.
func playBroker() error {
	b, err := embedded.StartBroker(context.Background(), os.Args[1], slog.Default())
	if err != nil {
		return err
	}
	fmt.Println(strings.Join(b.Addrs(), ","))
	_, _ = io.Copy(io.Discard, os.Stdin)
	return b.Close()
}

// broker is one that runs.
type broker struct {
	name  string
	addrs []string
	stop  func()
}

var running []broker

func stopBrokers() {
	for _, b := range running {
		b.stop()
	}
}

// onBrokers runs a measure on each broker. They are started when the first measure needs them, and warmed up: a JVM is
// slow at first.
func onBrokers(t *testing.T, measure func(t *testing.T, b broker)) {
	for _, name := range strings.Split(*only, ",") {
		t.Run(name, func(t *testing.T) {
			i := slices.IndexFunc(running, func(b broker) bool { return b.name == name })
			if i < 0 {
				b := broker{name: name}
				var err error
				switch name {
				case "kfake":
					err = b.startKfake()
				case "apache":
					err = b.startApache(t)
				default:
					t.Fatalf("no such broker: %s", name)
				}
				if errors.Is(err, apache.ErrMissing) {
					t.Skipf("nothing is measured on Apache Kafka: %v", err)
				}
				if err != nil {
					t.Fatal(err)
				}
				i = len(running)
				running = append(running, b)
				if *side == "" {
					journalRun(t, b, counterCommand(), true, closed(busy))
					rawRun(t, b, counterCommand().sample, closed(busy))
				}
			}
			measure(t, running[i])
		})
	}
}

func (b *broker) startKfake() error {
	dir, err := os.MkdirTemp("", "wharf-bench-")
	if err != nil {
		return err
	}
	c, err := play(context.Background(), "broker", dir)
	if err != nil {
		return err
	}
	in, err := c.StdinPipe()
	if err != nil {
		return err
	}
	out, err := c.StdoutPipe()
	if err != nil {
		return err
	}
	if err := c.Start(); err != nil {
		return err
	}
	b.stop = func() {
		_ = in.Close()
		_ = c.Wait()
		_ = os.RemoveAll(dir)
	}
	addrs, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		b.stop()
		return fmt.Errorf("the embedded broker: %w", err)
	}
	b.addrs = strings.Split(strings.TrimSpace(addrs), ",")
	return nil
}

func (b *broker) startApache(t *testing.T) error {
	dir, err := os.MkdirTemp("", "wharf-bench-")
	if err != nil {
		return err
	}
	c, err := apache.Start(context.WithoutCancel(t.Context()), dir, 1)
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	b.addrs = c.Addrs()
	b.stop = func() {
		c.Stop()
		_ = os.RemoveAll(dir)
	}
	return nil
}

// connect is a client of the broker, until the run ends.
func (b broker) connect(t *testing.T) (c *kafka.Client, end func()) {
	// That a new topic has no leader yet is no news.
	quiet := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
	c, err := kafka.Connect(t.Context(), kafka.Config{Brokers: b.addrs, Logger: quiet})
	if err != nil {
		t.Fatal(err)
	}
	return c, func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}
}

// topics creates topics, which remove deletes again.
func (b broker) topics(t *testing.T, c *kafka.Client, names ...string) (remove func()) {
	var specs []kafka.TopicSpec
	for _, name := range names {
		specs = append(specs, kafka.TopicSpec{Name: name, Partitions: partitions, Replication: 1})
	}
	if err := c.CreateTopics(t.Context(), specs); err != nil {
		t.Fatal(err)
	}
	return func() { b.remove(t, names) }
}

// client is the other end of HTTP: what it is to do. It places orders, or gets them.
type client struct {
	URL     string
	Callers int
	Rate    float64 // orders/s, or 0 for as many as are answered
	Seconds float64
	Orders  []string // GET one of these and not POST
}

// orderBody is the order that everybody places.
const orderBody = `{"customer":"17850","lines":[{"sku":"85123A","quantity":6,"unit_price":{"amount":255,"currency":"GBP"}},` +
	`{"sku":"71053","quantity":6,"unit_price":{"amount":339,"currency":"GBP"}}]}`

// run has a process of its own place orders at the URL.
func (c client) run(t *testing.T, url string) (s stat) {
	t.Helper()
	c.URL, c.Seconds = url, *seconds
	parameters, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	cmd, err := play(t.Context(), "client", string(parameters))
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.Output()
	if err == nil {
		var got [3]float64
		if err = json.Unmarshal(out, &got); err == nil {
			s = stat{got[0], got[1], got[2]}
		}
	}
	if err != nil {
		t.Fatalf("the HTTP client: %v", err)
	}
	return s
}

func playClient() error {
	var c client
	if err := json.Unmarshal([]byte(os.Args[1]), &c); err != nil {
		return err
	}
	*seconds = c.Seconds
	l := load{c.Callers, c.Rate}
	hc := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		MaxIdleConnsPerHost: c.Callers, MaxConnsPerHost: c.Callers, DisableCompression: true}}
	s, err := drive(l, func(int) error {
		req, want, err := c.request()
		if err != nil {
			return err
		}
		resp, err := hc.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		answer, err := io.ReadAll(resp.Body)
		if err != nil {
			return err
		}
		if resp.StatusCode != want {
			return fmt.Errorf("status %d: %s", resp.StatusCode, answer)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode([3]float64{s.rate, s.p50, s.p99})
}

func (c client) request() (req *http.Request, want int, err error) {
	if len(c.Orders) > 0 {
		req, err = http.NewRequest(http.MethodGet, c.URL+"/"+c.Orders[rand.IntN(len(c.Orders))], nil)
		return req, http.StatusOK, err
	}
	if req, err = http.NewRequest(http.MethodPost, c.URL, bytes.NewReader([]byte(orderBody))); err != nil {
		return nil, 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", uuid.NewString())
	return req, http.StatusCreated, nil
}
