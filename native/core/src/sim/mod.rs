//! Decisions played through in virtual time, with seeds.

mod gate;
mod link;
mod nat;
mod nodes;
