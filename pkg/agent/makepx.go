package agent

import (
	"context"

	"github.com/sallyport-dev/sallyport/pkg/px"
)

// MakePx makes px, or mends what is there, and gives its path. What runs in it goes on. An agent that finds px complete writes no
// sysctl and makes no mount, and so can do without the right to: in a container, that is most of what it would have to be given.
func MakePx(_ context.Context, o Options) (path string, err error) {
	cfg, err := o.config()
	if err != nil {
		return "", err
	}
	if err := makeDirs(cfg); err != nil {
		return "", err
	}
	ns, err := px.Create(px.Config{Path: cfg.PxPath()})
	if err != nil {
		return "", err
	}
	return ns.Path(), ns.Close()
}
