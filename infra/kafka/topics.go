package kafka

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/IBM/sarama"
)

// TopicSpec is what a topic has to be like. Every topic of the shop is the source of truth or a copy of it: nothing
// may ever be deleted, compacted or lost to an unclean election.
type TopicSpec struct {
	Name        string
	Partitions  int32
	Replication int16 // at least; 0, in a check, for whatever is found
}

// UnsafeTopicsError says what is wrong with topics, a line for every problem.
type UnsafeTopicsError struct{ problems error }

// Error has a line for every problem.
func (e *UnsafeTopicsError) Error() string { return e.problems.Error() }

// MadeAnewError says that a topic was deleted, and made anew under its name: what this Client has read of the old one
// is not in it, and offsets mean something else.
type MadeAnewError struct {
	Topic   string
	Was, Is string // the ids that the cluster gave
}

func (e *MadeAnewError) Error() string {
	return fmt.Sprintf("topic %s was deleted and made anew: its id is %s, wanted %s: what was in it is gone; restore it, or "+
		"make all topics and read models anew, and then start this program again", e.Topic, e.Is, e.Was)
}

// identity is the topic that this Client has first met under a name.
type identity struct {
	id   sarama.Uuid
	seen time.Time // the last time
}

// staleIdentity is for how long a topic is taken for the one that it was, where nothing speaks against it.
const staleIdentity = time.Second

// recognise is a *MadeAnewError if the topic is not the one that this Client knows by the name.
func (c *Client) recognise(topic string, id sarama.Uuid) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	none := sarama.Uuid{} // of a cluster that gives no ids
	known := c.known[topic]
	if known.id != none && id != none && known.id != id {
		c.known[topic] = identity{id: known.id}
		return &MadeAnewError{topic, known.id.String(), id.String()}
	}
	if id == none {
		id = known.id
	}
	c.known[topic] = identity{id, time.Now()}
	return nil
}

// sameTopic asks the broker, which leads a partition of the topic, whether it still is the one that this Client knows.
func (c *Client) sameTopic(ctx context.Context, addr, topic string) error {
	return c.do(ctx, func() error {
		conn := c.conn(addr, "topics")
		resp, err := conn.GetMetadata(sarama.NewMetadataRequest(c.conf.Version, []string{topic}))
		switch {
		case err != nil:
			c.discard(conn, "topics")
			return err
		case len(resp.Topics) != 1:
			return sarama.ErrIncompleteResponse
		case resp.Topics[0].Err != sarama.ErrNoError:
			return resp.Topics[0].Err
		}
		return c.recognise(topic, resp.Topics[0].Uuid)
	})
}

// lately says whether it was seen a moment ago that the topic is the one that this Client knows.
func (c *Client) lately(topic string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Since(c.known[topic].seen) < staleIdentity
}

// minInSync is the min.insync.replicas that a topic needs: a record must survive the loss of one broker, where there
// are enough of them.
func (s TopicSpec) minInSync() int {
	if s.Replication >= 3 {
		return 2
	}
	return 1
}

// config is the settings that the topic is created with.
func (s TopicSpec) config() map[string]string {
	return map[string]string{
		"cleanup.policy":                 "delete",
		"retention.ms":                   "-1",
		"retention.bytes":                "-1",
		"unclean.leader.election.enable": "false",
		"min.insync.replicas":            strconv.Itoa(s.minInSync()),
		"max.message.bytes":              strconv.Itoa(topicMessageBytes),
	}
}

// CreateTopics creates the topics that do not exist, and returns when they can be used. One that exists is left as it
// is: CheckTopics tells whether it will do.
func (c *Client) CreateTopics(ctx context.Context, specs []TopicSpec) error {
	wait := make([]int32, len(specs)) // for that many partitions
	for i, s := range specs {
		wait[i] = 1
		err := c.admin(ctx, func(a sarama.ClusterAdmin) error {
			detail := &sarama.TopicDetail{
				NumPartitions: s.Partitions, ReplicationFactor: s.Replication, ConfigEntries: map[string]*string{},
			}
			for setting, value := range s.config() {
				detail.ConfigEntries[setting] = &value
			}
			err := a.CreateTopic(s.Name, detail, false)
			if errors.Is(err, sarama.ErrTopicAlreadyExists) {
				return nil // perhaps with fewer partitions
			}
			wait[i] = s.Partitions
			return err
		})
		if err != nil {
			return fmt.Errorf("create topic %s: %w", s.Name, err)
		}
	}
	// The cluster knows a new topic some time before its leaders serve it.
	ctx, cancel := context.WithTimeout(ctx, c.cfg.ConnectTimeout)
	defer cancel()
	for i, s := range specs {
		for p := range wait[i] {
			if _, err := c.Reader(s.Name).End(ctx, p); err != nil {
				return fmt.Errorf("create topic %s: %w", s.Name, err)
			}
		}
	}
	return nil
}

// CheckTopics is nil when all the topics are as they must be. Otherwise the error is an *UnsafeTopicsError with a line
// for every problem, which names the topic, the setting, what was found, what is wanted and how to set it right; or it
// says why they cannot be checked.
func (c *Client) CheckTopics(ctx context.Context, specs []TopicSpec) error {
	names := make([]string, len(specs))
	for i, s := range specs {
		names[i] = s.Name
	}
	var problems []error
	err := c.admin(ctx, func(a sarama.ClusterAdmin) error {
		found, err := a.DescribeTopics(names)
		if err != nil {
			return err
		}
		byName := map[string]*sarama.TopicMetadata{}
		for _, t := range found {
			byName[t.Name] = t
		}
		problems = nil // of an earlier try
		for _, s := range specs {
			t := byName[s.Name]
			switch {
			case t == nil || t.Err == sarama.ErrUnknownTopicOrPartition:
				problems = append(problems, fmt.Errorf("topic %s does not exist: create it with `wharf topics`", s.Name))
				continue
			case t.Err != sarama.ErrNoError:
				return fmt.Errorf("topic %s: %w", s.Name, t.Err)
			}
			if err := c.recognise(s.Name, t.Uuid); err != nil {
				problems = append(problems, err)
			}
			described, err := a.DescribeConfigs([]*sarama.ConfigResource{{Type: sarama.TopicResource, Name: s.Name}},
				sarama.DescribeConfigsOptions{})
			if err != nil {
				return fmt.Errorf("topic %s: %w", s.Name, err)
			}
			config := map[string]string{}
			for _, d := range described {
				if d.ErrorCode != sarama.ErrNoError {
					return fmt.Errorf("topic %s: its settings: %w", s.Name, d.ErrorCode)
				}
				for _, e := range d.Configs {
					config[e.Name] = e.Value
				}
			}
			problems = append(problems, s.problems(t, config)...)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("check the topics: %w", err)
	}
	if len(problems) > 0 {
		return &UnsafeTopicsError{errors.Join(problems...)}
	}
	return nil
}

// problems compares what was found with what is wanted.
func (s TopicSpec) problems(t *sarama.TopicMetadata, config map[string]string) (problems []error) {
	replicas := math.MaxInt16
	for _, p := range t.Partitions {
		replicas = min(replicas, len(p.Replicas))
	}
	if s.Replication == 0 {
		s.Replication = int16(replicas)
	}
	problem := func(setting, found, wanted, fix string) {
		problems = append(problems, fmt.Errorf("topic %s: %s is %s, wanted %s: %s",
			s.Name, setting, or(found, "not set"), wanted, fix))
	}
	set := func(setting, wanted, value string) {
		problem(setting, config[setting], wanted, fmt.Sprintf(
			"kafka-configs.sh --alter --entity-type topics --entity-name %s --add-config %s=%s", s.Name, setting, value))
	}
	if found := len(t.Partitions); found != int(s.Partitions) {
		problem("the partition count", strconv.Itoa(found), strconv.Itoa(int(s.Partitions)), fmt.Sprintf(
			"run with %d partitions, or make all topics anew (the count of a topic with events in it cannot be changed)", found))
	}
	if replicas < int(s.Replication) {
		problem("the replication factor", strconv.Itoa(replicas), strconv.Itoa(int(s.Replication)),
			"kafka-reassign-partitions.sh, or run with that replication factor")
	}
	created := s.config()
	for _, setting := range slices.Sorted(maps.Keys(created)) {
		wanted := created[setting]
		found, ok := config[setting]
		n, err := strconv.ParseInt(found, 10, 64)
		number := err == nil
		switch setting {
		case "min.insync.replicas":
			if !number || n < int64(s.minInSync()) {
				set(setting, "at least "+wanted, wanted)
			} else if n > int64(replicas) {
				set(setting, fmt.Sprintf("at most %d (or nothing can be written)", replicas), wanted)
			}
		case "max.message.bytes":
			if !number || n < minTopicMessageBytes {
				set(setting, "at least "+strconv.Itoa(minTopicMessageBytes), wanted)
			}
		case "unclean.leader.election.enable":
			if ok && found != wanted { // some brokers do not report it while it is not set, and then it is false
				set(setting, wanted, wanted)
			}
		default:
			if found != wanted {
				set(setting, wanted, wanted)
			}
		}
	}
	return problems
}

// ParkedIn is what a group's Subscriber has parked in a source partition.
type ParkedIn struct {
	Topic     string
	Partition int32
	Parked
}

// GroupLag is how many offsets the group has not yet committed, summed over all partitions of the topics (where it never
// committed, all of them), and what its Subscribers have parked: the first few of each source partition.
func (c *Client) GroupLag(ctx context.Context, group string, topics []string) (lag int64, parked []ParkedIn, err error) {
	asked := map[string][]int32{}
	var committed *sarama.OffsetFetchResponse
	err = c.admin(ctx, func(a sarama.ClusterAdmin) (err error) {
		for _, t := range topics {
			if asked[t], err = c.sarama.Partitions(t); err != nil {
				return fmt.Errorf("topic %s: %w", t, err)
			}
		}
		committed, err = a.ListConsumerGroupOffsets(group, asked)
		if errors.Is(err, sarama.ErrGroupIDNotFound) {
			err = nil // some brokers say so while nobody has ever joined; others have no offset then
		}
		return err
	})
	if err != nil {
		return 0, nil, fmt.Errorf("find the lag of group %s: %w", group, err)
	}
	for topic, partitions := range asked {
		for _, p := range partitions {
			end, err := c.Reader(topic).End(ctx, p)
			if err != nil {
				return 0, nil, fmt.Errorf("find the lag of group %s: %w", group, err)
			}
			if block := committed.GetBlock(topic, p); block != nil && block.Err == sarama.ErrNoError {
				end -= max(0, block.Offset)
				_, here, _ := parseProgress(block.Metadata)
				for _, one := range here {
					parked = append(parked, ParkedIn{topic, p, one})
				}
			}
			lag += max(0, end)
		}
	}
	return lag, parked, nil
}

// admin runs f with Sarama's cluster administration, on connections that nobody else uses meanwhile. Shared ones will not
// do: who asks while another is opening one is told that it is not connected, and who closes one that has failed cuts off
// all the others. When old connections fail, f is run once more on new ones: they may have been idle for too long.
func (c *Client) admin(ctx context.Context, f func(sarama.ClusterAdmin) error) error {
	return c.do(ctx, func() error {
		a, used, err := c.takeAdmin()
		if err != nil {
			return err
		}
		err = f(a)
		if used && unanswered(err) && ctx.Err() == nil {
			_ = a.Close() // see discard
			c.closeAdmins()
			if a, err = c.newAdmin(); err != nil {
				return err
			}
			err = f(a)
		}
		c.mu.Lock()
		keep := !unanswered(err) && len(c.admins) < idleAdmins
		if keep {
			c.admins = append(c.admins, a)
		}
		c.mu.Unlock()
		if !keep {
			_ = a.Close()
		}
		return err
	})
}

// unanswered says that the error is none of a broker's answers.
func unanswered(err error) bool {
	var refused sarama.KError
	return err != nil && !errors.As(err, &refused)
}

// takeAdmin is an administration that is idle, or else a new one.
func (c *Client) takeAdmin() (a sarama.ClusterAdmin, used bool, err error) {
	c.mu.Lock()
	if last := len(c.admins) - 1; last >= 0 {
		a, c.admins = c.admins[last], c.admins[:last]
	}
	c.mu.Unlock()
	if a != nil {
		return a, true, nil
	}
	a, err = c.newAdmin()
	return a, false, err
}

// newAdmin starts from the brokers that are known by now: the addresses of Config need not answer any more.
func (c *Client) newAdmin() (sarama.ClusterAdmin, error) {
	addrs := c.cfg.Brokers
	if known := c.sarama.Brokers(); len(known) > 0 {
		addrs = nil
		for _, b := range known {
			addrs = append(addrs, b.Addr())
		}
	}
	conf := *c.conf
	conf.Metadata.Timeout = 0 // all of them are asked, however long one takes
	conf.Net.ReadTimeout = min(conf.Net.ReadTimeout, adminTimeout)
	return sarama.NewClusterAdmin(addrs, &conf)
}

func (c *Client) closeAdmins() {
	c.mu.Lock()
	idle := c.admins
	c.admins = nil
	c.mu.Unlock()
	for _, a := range idle {
		_ = a.Close()
	}
}

const (
	adminTimeout = 4 * time.Second // after which a broker that does not answer is given up for another
	idleAdmins   = 4
)

// TopicIDs is the id of each topic, which is another one when the topic is made anew; empty where the cluster gives none. It is an
// error when a topic does not exist; brokers that are away are waited for, as Connect does.
func (c *Client) TopicIDs(ctx context.Context, topics []string) (ids map[string]string, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.ConnectTimeout)
	defer cancel()
	for retry := (backoff{}); ; {
		ids, err = c.identify(ctx, topics)
		if err == nil || errors.Is(err, sarama.ErrUnknownTopicOrPartition) || !retry.sleep(ctx) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("identify the topics: %w", err)
	}
	return ids, nil
}

func (c *Client) identify(ctx context.Context, topics []string) (map[string]string, error) {
	got := make(chan map[string]string, 1)
	err := c.admin(ctx, func(a sarama.ClusterAdmin) error {
		found, err := a.DescribeTopics(topics)
		if err != nil {
			return err
		}
		ids := map[string]string{}
		for _, t := range found {
			if t.Err != sarama.ErrNoError {
				return fmt.Errorf("topic %s: %w (wharf topics creates topics)", t.Name, t.Err)
			}
			ids[t.Name] = ""
			if t.Uuid != (sarama.Uuid{}) {
				ids[t.Name] = t.Uuid.String()
			}
		}
		got <- ids
		return nil
	})
	if err != nil {
		return nil, err
	}
	return <-got, nil
}

// Partitions is how many partitions the topic has.
func (c *Client) Partitions(ctx context.Context, topic string) (int, error) {
	var partitions []int32
	err := c.do(ctx, func() (err error) {
		partitions, err = c.sarama.Partitions(topic)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("ask for the partitions of %s: %w", topic, err)
	}
	return len(partitions), nil
}
