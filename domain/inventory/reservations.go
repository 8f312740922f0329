package inventory

import "github.com/google/uuid"

// reservations maps orders to units. It is immutable: with and without return another map that shares all but one
// path with the old one, so a hot SKU with thousands of open orders costs a decision a few hundred bytes and no copy.
// It is a trie over the order id's nibbles; the ids are random enough to keep it flat.
type reservations struct{ root *node }

// A node is a leaf (units > 0) or has children.
type node struct {
	order    uuid.UUID
	units    int64
	children *[16]*node
}

func nibble(id uuid.UUID, depth int) byte { return id[depth/2] >> (4 * (1 - depth%2)) & 15 }

func (r reservations) of(order uuid.UUID) int64 {
	n := r.root
	for depth := 0; n != nil; depth++ {
		if n.children == nil {
			if n.order == order {
				return n.units
			}
			return 0
		}
		n = n.children[nibble(order, depth)]
	}
	return 0
}

func (r reservations) with(order uuid.UUID, units int64) reservations {
	return reservations{r.root.with(&node{order: order, units: units}, 0)}
}

func (n *node) with(leaf *node, depth int) *node {
	if n == nil || n.children == nil && n.order == leaf.order {
		return leaf
	}
	var children [16]*node
	if n.children == nil {
		children[nibble(n.order, depth)] = n
	} else {
		children = *n.children
	}
	i := nibble(leaf.order, depth)
	children[i] = children[i].with(leaf, depth+1)
	return &node{children: &children}
}

func (r reservations) without(order uuid.UUID) reservations {
	return reservations{r.root.without(order, 0)}
}

func (n *node) without(order uuid.UUID, depth int) *node {
	if n == nil || n.children == nil {
		if n != nil && n.order == order {
			return nil
		}
		return n
	}
	i := nibble(order, depth)
	children := *n.children
	children[i] = children[i].without(order, depth+1)
	if children[i] == n.children[i] {
		return n
	}
	var only *node
	for _, c := range children {
		if c != nil && (only != nil || c.children != nil) {
			return &node{children: &children}
		}
		if c != nil {
			only = c
		}
	}
	return only
}
