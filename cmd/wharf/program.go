package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"golang.org/x/sync/errgroup"

	"wharf/commands"
	"wharf/domain"
	"wharf/infra/journal"
	"wharf/infra/kafka"
	"wharf/infra/policies"
	"wharf/infra/web"
	"wharf/projections"
)

// services are the four, in the order of their dependence on each other's events.
var services = []string{"orders", "inventory", "payments", "shipping"}

// sources is whose events each service reacts to.
var sources = map[string][]string{
	"orders":    {"inventory", "payments", "shipping"},
	"inventory": {"orders", "shipping"},
	"payments":  {"orders", "shipping"},
	"shipping":  {"orders"},
}

func journalTopic(service string) string { return service + ".journal" }
func publicTopic(service string) string  { return service + ".events" }

func publicTopics(services ...string) (topics []string) {
	for _, s := range services {
		topics = append(topics, publicTopic(s))
	}
	return topics
}

func topicSpecs(partitions, replication int) (specs []kafka.TopicSpec) {
	for _, s := range services {
		for _, name := range []string{journalTopic(s), publicTopic(s)} {
			specs = append(specs, kafka.TopicSpec{Name: name, Partitions: int32(partitions), Replication: int16(replication)})
		}
	}
	return specs
}

// readSideMemory is how much memory a program of the read side takes, about, before it collects garbage more often: the more
// processors, the more tasks fill builds at a time.
func readSideMemory() int64 { return (256 + 128*int64(runtime.GOMAXPROCS(0))) << 20 }

// How much garbage, in percent of what is alive, may lie before it is collected. A replay runs beside the shop: rarer collections
// are longer ones, and with 400 the slowest queries took half as long again meanwhile.
const (
	shopGarbage   = 400
	replayGarbage = 200
)

// collectLess is for a program that makes much garbage and keeps little: it lets more of it lie, up to a limit in bytes,
// where collecting it took a quarter of the processor's time. GOGC and GOMEMLIMIT have the last word.
func collectLess(percent int, limit int64) {
	if os.Getenv("GOGC") != "" {
		return
	}
	debug.SetGCPercent(percent)
	if os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(limit)
	}
}

// part is what makes a program: routes, something that runs, or both.
type part struct {
	register func(huma.API)
	run      func(context.Context) error
	ready    func() error
}

// serve runs the parts and serves their routes on the listener, until ctx ends. Then requests are drained first, and
// the parts stopped after that: a command under way gets its answer.
func serve(ctx context.Context, l net.Listener, client *kafka.Client, parts ...part) error {
	ids, err := client.TopicIDs(ctx, projections.Topics)
	if err != nil {
		return err
	}
	document, err := web.Document(allRoutes)
	if err != nil {
		return fmt.Errorf("make the OpenAPI document: %w", err)
	}
	mux := http.NewServeMux()
	api := web.NewAPI(mux)
	for _, p := range parts {
		if p.register != nil {
			p.register(api)
		}
	}
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, life := errgroup.WithContext(life)
	for _, p := range parts {
		if p.run != nil {
			group.Go(func() error { return p.run(life) })
		}
	}
	group.Go(func() error {
		defer stop()
		serving, cancel := context.WithCancel(ctx)
		defer cancel()
		context.AfterFunc(life, cancel) // a part has failed
		slog.Info("serving", "addr", l.Addr().String())
		err := web.Serve(serving, l, web.Handler(mux, document, web.InstallationOf(ids), func() error {
			if ctx.Err() != nil {
				return errors.New("shutting down")
			}
			for _, p := range parts {
				if p.ready != nil {
					if err := p.ready(); err != nil {
						return err
					}
				}
			}
			return nil
		}))
		slog.Info("drained")
		return err
	})
	return group.Wait()
}

// listen opens the address that a program serves at.
func listen(addr string) (net.Listener, error) {
	if err := checkAddr(addr); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%w (choose another address with --addr)", err)
	}
	return l, nil
}

func checkAddr(addr string) error {
	if _, _, err := net.SplitHostPort(addr); err != nil {
		return usageError("--addr: expected host:port")
	}
	return nil
}

// service is one service on its journal: what its routes and drivers speak to, and what keeps it going.
type service[S commands.State[S]] struct {
	name     string
	journal  *journal.Journal[S]
	policies *policies.Runner[S]
	specs    []kafka.TopicSpec
	client   *kafka.Client
	drive    func(ctx context.Context, partition int32)
}

// newService puts a service together.
func newService[S commands.State[S]](client *kafka.Client, name string, partitions int, vocabulary domain.Events,
	table commands.Policies[S]) *service[S] {
	s := &service[S]{name: name, client: client}
	s.journal = journal.New[S](journal.Config{
		Service: name, Topic: publicTopic(name), Partitions: partitions, Events: vocabulary,
		Log: client.Log(journalTopic(name)), Public: client.PublicLog(publicTopic(name)),
	})
	s.policies = policies.New(client, policies.Config[S]{
		Service: name, Topics: publicTopics(sources[name]...), Journal: s.journal, Policies: table, Owned: s.own,
		Logger: slog.Default().With("service", name),
	})
	for _, topic := range append([]string{journalTopic(name), publicTopic(name)}, publicTopics(sources[name]...)...) {
		s.specs = append(s.specs, kafka.TopicSpec{Name: topic, Partitions: int32(partitions)})
	}
	return s
}

// own does what one replica does for a partition: it publishes its events, and, once the policies know all that has
// happened elsewhere, lets time pass and asks the outside world.
func (s *service[S]) own(ctx context.Context, partition int32, caughtUp func(context.Context) error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.journal.Publish(ctx, partition)
	}()
	defer func() { <-done }()
	if s.drive == nil {
		return
	}
	for {
		err := caughtUp(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			break
		}
		slog.Warn("cannot tell whether the policies have caught up", "service", s.name, "partition", partition, "err", err)
		if !sleep(ctx, time.Second) {
			return
		}
	}
	s.drive(ctx, partition)
}

// run keeps the service going until ctx ends. It refuses to run on topics that could lose events.
func (s *service[S]) run(ctx context.Context) error {
	if err := s.client.CheckTopics(ctx, s.specs); err != nil {
		return fmt.Errorf("check the topics of %s: %w", s.name, err)
	}
	// The journal outlives the policies, which need it to finish what they are at.
	life, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	group, life := errgroup.WithContext(life)
	group.Go(func() error { return s.journal.Run(life) })
	group.Go(func() error {
		defer stop()
		working, cancel := context.WithCancel(ctx)
		defer cancel()
		context.AfterFunc(life, cancel) // the journal has failed
		return s.policies.Run(working)
	})
	group.Go(func() error { return watchTopics(life, s.client, s.specs) })
	group.Go(func() error { s.watch(life); return nil })
	return group.Wait()
}

// ready does not mind a partition that has halted, of the journal or of a source: that must not close the others. It is
// said in the log every minute (see watch), and /projections shows the policies' lag.
func (s *service[S]) ready() error { return s.journal.Ready() }

// watch says again, once a minute, what has halted.
func (s *service[S]) watch(ctx context.Context) {
	for sleep(ctx, time.Minute) {
		if err := errors.Join(s.journal.Halted(), s.policies.Halted()); err != nil {
			slog.Error("partitions are halted", "service", s.name, "err", err)
		}
	}
}

// watchTopics looks at the topics once a minute, and ends with an error when somebody has made them unsafe.
func watchTopics(ctx context.Context, client *kafka.Client, specs []kafka.TopicSpec) error {
	for sleep(ctx, time.Minute) {
		err := client.CheckTopics(ctx, specs)
		var unsafe *kafka.UnsafeTopicsError
		if errors.As(err, &unsafe) {
			return err
		}
		if err != nil && ctx.Err() == nil {
			slog.Warn("the topics cannot be checked", "err", err)
		}
	}
	return nil
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// printJSON prints data for programs.
func printJSON(v any) error {
	e := json.NewEncoder(stdout)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
