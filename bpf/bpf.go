// Package bpf holds the tc programs of Sallyport and their generated loader, and nothing else.
// Only pkg/datapath reads it.
package bpf

//go:generate go tool bpf2go -go-package bpf -output-stem sallyport -target bpfel -cc clang-16 -cflags "-O2 -g -Wall -Wextra -Werror -mcpu=v3 -fms-extensions -Wno-microsoft-anon-tag -I/usr/include/x86_64-linux-gnu -ffile-prefix-map=.=." -type sp_event -type sp_volume -type sp_state -type sp_target -type sp_hook -type sp_flags -type sp_leg_side -type sp_fragment_kind -type sp_verdict -type sp_reason -type sp_event_kind -type sp_ingress -type sp_fact -type sp_mode -type sp_seen Sallyport sallyport.c

// Names of the kernel's types as Go knows them, from the BTF of the programs.
type (
	Addr        = SallyportSpAddr
	Backstop    = SallyportSpBackstop
	BackstopKey = SallyportSpBackstopKey
	Bucket      = SallyportSpBucket
	Budget      = SallyportSpBudget
	Config      = SallyportSpConfig
	Counter     = SallyportSpCounter
	Decided     = SallyportSpDecided
	Deny        = SallyportSpDeny
	DenyKey     = SallyportSpDenyKey
	Device      = SallyportSpDevice
	Event       = SallyportSpEvent
	Flow        = SallyportSpFlow
	FlowKey     = SallyportSpFlowKey
	Fragment    = SallyportSpFragment
	FragmentKey = SallyportSpFragmentKey
	Lease       = SallyportSpLease
	Leg         = SallyportSpLeg
	LegKey      = SallyportSpLegKey
	Origin      = SallyportSpOrigin
	OriginKey   = SallyportSpOriginKey
	Owner       = SallyportSpOwner
	OwnerKey    = SallyportSpOwnerKey
	Path        = SallyportSpPath
	PathKey     = SallyportSpPathKey
	PathRef     = SallyportSpPathRef
	PathStatus  = SallyportSpPathStatus
	Ports       = SallyportSpPorts
	Prefix      = SallyportSpPrefix
	SYNLimits   = SallyportSpSynLimits
	Seen        = SallyportSpSeen
	Sequence    = SallyportSpSequence
	Service     = SallyportSpService
	ServiceKey  = SallyportSpServiceKey
	Source      = SallyportSpSource
	Speaker     = SallyportSpSpeaker
	Caller      = SallyportSpCaller
	Tokens      = SallyportSpTokens
	Traffic     = SallyportSpTraffic
	Volume      = SallyportSpVolume
	Watched     = SallyportSpWatched
)
